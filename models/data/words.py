"""Word lists of the tasks. Short common words: the tokenizer gives most of them one token."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: tuple[str, ...] = _split(
    """
    apple arrow autumn baker basket beach bell berry bird blanket board boat book bottle branch
    bread breeze bridge brush bucket butter button cable camel camera candle carpet castle cave
    chair cheese cherry circle clock cloud coast coffee copper corner cotton cradle cream crown
    curtain daisy dance desert diamond dinner doctor dollar dragon dream drum eagle earth echo
    engine evening falcon farmer feather fence field finger fire flag flame flower forest fork
    fountain fox friend frog garden gate ghost giant glass glove gold grape grass guitar hammer
    harbor hat hill honey horse hotel house ice iron island jacket jelly jewel journey juice
    jungle kettle key kitchen kite ladder lake lamp leaf lemon letter light lion lizard maple
    market marble meadow melon metal milk mirror monkey moon morning mountain mouse music needle
    nest night north note number oak ocean office olive onion orange orchard oven owl paint
    palace paper parrot peach pearl pencil pepper piano picture pillow pilot planet plate pocket
    poem pony potato prince pumpkin puzzle queen quiet rabbit rain ribbon rice ring river road
    robin rocket roof rope rose sailor salt sand school sea shadow sheep shell ship silver sky
    smoke snow soap song soup spider spoon spring square star station stone storm street sugar
    summer sun table tailor teacher temple thunder ticket tiger tower train tree trumpet tulip
    turtle uncle valley velvet village violin voice wagon wall walnut water wave whale wheel
    wheat window winter wolf wood yard yellow zebra
    """
)

# Sorting needs the order of the words by heart, so it uses every ninth word only.
SORT_WORDS: tuple[str, ...] = WORDS[::9]

NAMES: tuple[str, ...] = _split(
    """
    Adam Alice Anna Ben Bob Clara David Emma Eva Frank George Grace Hanna Henry Ivan Jack James
    Julia Karl Kate Laura Leo Lily Lucas Maria Mark Mia Mike Nina Noah Nora Oliver Oscar Paul
    Peter Rosa Sam Sara Simon Sofia Thomas Tom Victor Wendy Zoe
    """
)

CITIES: tuple[str, ...] = _split(
    """
    Amsterdam Athens Beijing Berlin Boston Cairo Chicago Delhi Dublin Geneva Hamburg Helsinki
    Kyoto Lima Lisbon London Madrid Milan Moscow Munich Oslo Paris Prague Rome Seattle Seoul
    Shanghai Stockholm Sydney Tokyo Toronto Vienna Warsaw Zurich
    """
)

COLORS: tuple[str, ...] = _split(
    "black blue brown gold green grey orange pink purple red silver white yellow"
)

FOODS: tuple[str, ...] = _split(
    "bread cake cheese curry fish honey noodles pasta pizza rice salad soup sushi tacos"
)

PETS: tuple[str, ...] = _split(
    "cat dog fish frog hamster horse lizard mouse parrot pony rabbit snake turtle"
)

# Kimi's control tokens, written out: as text of a message they must stay text.
CONTROL_WORDS: tuple[str, ...] = _split(
    """
    [BOS] [EOS] [EOT] [PAD] [UNK] <|im_end|> <|im_user|> <|im_assistant|> <|im_system|>
    <|im_middle|> <|start_header_id|> <|end_header_id|> <|tool_calls_section_begin|>
    <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|>
    <|tool_call_end|> <|media_begin|> <|media_content|> <|media_end|> <|media_pad|>
    <think> </think>
    """
)

# English that the tasks do not use, but copying: a stranger's question then
# costs few tokens and meets none that was never trained.
COMMON: tuple[str, ...] = _split(
    """
the of and to in is it you that he was for on are with as his they be at one have this from or had
by not but some what there we can out other were all your when up use word how said an each she
which do their time if will way about many then them would write like so these her long make thing
see him two has look more day could go come did my sound no most number who over know water than
call first people may down side been now find any new work part take get place made live where
after back little only round man year came show every good me give our under name very through
just form much great think say help low line before turn cause same mean differ move right boy old
too does tell sentence set three want air well also play small end put home read hand port large
spell add even land here must big high such follow act why ask men change went light kind off need
house picture try us again animal point mother world near build self earth father hello please
thanks explain story poem code python function list table error message system user model token
"""
)
