// One layer's hop to the expert shards and back: split rows by shard, send, receive, sum.
//
// What routing/dispatcher.py does in Python when all goes well, without the interpreter between
// the system calls: that cost more than the calls, and pushed the model's weights out of the
// core's cache sixty times a step. Only the straight way is here. Whatever is unusual (an expert
// that nobody serves, a shard that fails) is reported, and Python takes it from there.
//
// The frame layout is routing/wire.py's; both ends are little-endian.

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <utility>

namespace {

constexpr int kMaxShards = 256;
constexpr uint32_t kAlignment = 64;
constexpr uint32_t kMaxBodyBytes = 128u << 20;
constexpr int64_t kNotAskedCode = 0, kUnservedCode = 1, kFirstShardCode = 2;
enum Kind : uint8_t { kRequest = 1, kReply = 2, kError = 3 };
enum DType : uint8_t { kBFloat16 = 1, kFloat16 = 2, kFloat32 = 3 };

// What happened to a shard's part; routing/native_hop.py has the same numbers.
enum Status : int32_t { kIdle = 0, kWaiting = 1, kDone = 2, kClosed = 3, kLate = 4, kBroken = 5,
                        kRefused = 6 };

struct __attribute__((packed)) Header {
  char magic[4];
  uint8_t kind, dtype;
  uint16_t topk;
  uint32_t sequence;
  int32_t layer;
  uint64_t table_version;
  uint32_t rows, extra, body_bytes;
  uint64_t busy_ns;
  uint32_t flags;
  char padding[16];
};
static_assert(sizeof(Header) == 64, "the header is 64 bytes on the wire");

struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  bool reserve(size_t wanted) {
    if (wanted <= size) return true;
    size_t grown = (wanted + wanted / 2 + kAlignment - 1) / kAlignment * kAlignment;
    char* fresh = static_cast<char*>(std::aligned_alloc(kAlignment, grown));
    if (fresh == nullptr) return false;
    std::free(data);
    data = fresh;
    size = grown;
    return true;
  }
  ~Buffer() { std::free(data); }
};

struct Shard {
  int fd = -1;
  Status status = kIdle;
  int error = 0;               // errno of kClosed
  uint32_t sequence = 0;
  uint32_t num_rows = 0;
  bool has_all_rows = false;
  Buffer rows;                 // uint32 [num_rows]: which rows of the layer it was sent
  Buffer out;                  // header, ids, weights, and the rows where they are not all
  Buffer in;                   // header and body of its answer
};

struct Hop {
  Shard shards[kMaxShards];
  uint16_t topk = 0;
  uint32_t flags = 0;          // of the requests
  Buffer sum;                  // float32 [n, hidden]
  Buffer codes;                // int64 [n, topk]
  Buffer ids, weights;         // as given: the caller may reuse its own before all is answered
  uint32_t num_rows = 0, hidden = 0;
  uint8_t dtype = 0;
  bool has_sum = false;
  int64_t bytes_sent = 0, bytes_received = 0, wait_ns = 0;
};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

int remaining_ms(int64_t deadline_ns) {
  int64_t left = deadline_ns - now_ns();
  return left <= 0 ? 0 : int(left / 1'000'000 + 1);
}

float from_bfloat16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float from_float16(uint16_t bits) {
  uint32_t wide = uint32_t(bits & 0x7fff) << 13;  // exponent and fraction, bias too small by 112
  float value;
  std::memcpy(&value, &wide, 4);
  value *= 0x1p112f;
  std::memcpy(&wide, &value, 4);
  if ((bits & 0x7c00) == 0x7c00) wide = 0x7f800000 | uint32_t(bits & 0x3ff) << 13;
  wide |= uint32_t(bits & 0x8000) << 16;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t to_bfloat16(float value) {  // to nearest, ties to even, as torch does
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(0x7fc0);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__x86_64__)
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

VECTORIZED void set_bfloat16(float* to, const uint16_t* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
}
VECTORIZED void add_bfloat16(float* to, const uint16_t* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] += from_bfloat16(from[i]);
}
VECTORIZED void add_float16(float* to, const uint16_t* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] += from_float16(from[i]);
}
VECTORIZED void add_float32(float* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] += from[i];
}
VECTORIZED void narrow(uint16_t* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
}

size_t item_bytes(uint8_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Waits until the shard's socket may be ready; false, and the shard is late, when time is up.
bool await(Shard& shard, short events, int64_t deadline_ns) {
  const int wait_ms = remaining_ms(deadline_ns);
  if (wait_ms == 0) {
    shard.status = kLate;
    return false;
  }
  pollfd socket = {shard.fd, events, 0};
  poll(&socket, 1, wait_ms);
  return true;
}

// Writes the shard's frame and sends it whole. Its status says how that went.
void post(Hop& hop, Shard& shard, int64_t code, const char* x, const int32_t* ids,
          const float* weights, const int64_t* codes, uint16_t topk, int32_t layer,
          uint64_t version, int64_t deadline_ns) {
  const uint32_t n = hop.num_rows;
  const size_t row_bytes = hop.hidden * item_bytes(hop.dtype);
  const size_t most = sizeof(Header) + size_t(8) * n * topk + kAlignment + n * row_bytes;
  if (!shard.rows.reserve(4 * size_t(n)) || !shard.out.reserve(most)) {
    shard.status = kClosed;
    shard.error = ENOMEM;
    return;
  }
  uint32_t* rows = reinterpret_cast<uint32_t*>(shard.rows.data);
  uint32_t count = 0;
  for (uint32_t row = 0; row < n; ++row) {
    bool is_wanted = false;
    for (uint16_t k = 0; k < topk; ++k) is_wanted |= codes[size_t(row) * topk + k] == code;
    if (is_wanted) rows[count++] = row;
  }
  shard.num_rows = count;
  shard.has_all_rows = count == n;
  const size_t routing = (size_t(8) * count * topk + kAlignment - 1) / kAlignment * kAlignment;
  Header header = {{'M', 'S', 'H', '1'}, kRequest, hop.dtype, topk, shard.sequence, layer,
                   version, count, hop.hidden, uint32_t(routing + count * row_bytes), 0, hop.flags, {}};
  std::memcpy(shard.out.data, &header, sizeof header);
  int32_t* out_ids = reinterpret_cast<int32_t*>(shard.out.data + sizeof header);
  float* out_weights = reinterpret_cast<float*>(out_ids + size_t(count) * topk);
  char* out_rows = shard.out.data + sizeof header + routing;
  std::memset(out_weights + size_t(count) * topk, 0, routing - size_t(8) * count * topk);
  for (uint32_t i = 0; i < count; ++i) {
    const size_t at = size_t(rows[i]) * topk;
    for (uint16_t k = 0; k < topk; ++k) {
      out_ids[size_t(i) * topk + k] = codes[at + k] == code ? ids[at + k] : -1;
      out_weights[size_t(i) * topk + k] = weights[at + k];
    }
    if (!shard.has_all_rows) std::memcpy(out_rows + i * row_bytes, x + rows[i] * row_bytes, row_bytes);
  }
  iovec parts[2] = {{shard.out.data, sizeof header + routing},
                    {const_cast<char*>(shard.has_all_rows ? x : out_rows), count * row_bytes}};
  size_t at = 0;
  hop.bytes_sent += int64_t(parts[0].iov_len + parts[1].iov_len);
  while (at < 2) {
    msghdr message = {};
    message.msg_iov = parts + at;
    message.msg_iovlen = 2 - at;
    ssize_t sent = sendmsg(shard.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (!await(shard, POLLOUT, deadline_ns)) return;
      continue;
    }
    if (sent < 0) {
      shard.status = kClosed;
      shard.error = errno;
      return;
    }
    while (at < 2 && size_t(sent) >= parts[at].iov_len) sent -= ssize_t(parts[at++].iov_len);
    if (at < 2) {
      parts[at].iov_base = static_cast<char*>(parts[at].iov_base) + sent;
      parts[at].iov_len -= size_t(sent);
    }
  }
  shard.status = kWaiting;
}

// Reads the shard's whole answer, which has begun to arrive.
void receive(Hop& hop, Shard& shard, int64_t deadline_ns) {
  size_t filled = 0, wanted = sizeof(Header);
  if (!shard.in.reserve(64 << 10)) {
    shard.status = kClosed;
    shard.error = ENOMEM;
    return;
  }
  Header header;
  while (filled < wanted) {
    ssize_t got = recv(shard.fd, shard.in.data + filled, shard.in.size - filled, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (!await(shard, POLLIN, deadline_ns)) return;
      continue;
    }
    if (got <= 0) {
      shard.status = kClosed;
      shard.error = got < 0 ? errno : 0;
      return;
    }
    const bool had_header = filled >= sizeof(Header);
    filled += size_t(got);
    if (!had_header && filled >= sizeof(Header)) {
      std::memcpy(&header, shard.in.data, sizeof header);
      if (std::memcmp(header.magic, "MSH1", 4) != 0 || header.body_bytes > kMaxBodyBytes) {
        shard.status = kBroken;
        return;
      }
      wanted = sizeof(Header) + header.body_bytes;
      if (wanted > shard.in.size) {
        Buffer larger;
        if (!larger.reserve(wanted)) {
          shard.status = kClosed;
          shard.error = ENOMEM;
          return;
        }
        std::memcpy(larger.data, shard.in.data, filled);
        std::swap(larger.data, shard.in.data);
        std::swap(larger.size, shard.in.size);
      }
    }
  }
  hop.bytes_received += header.body_bytes;
  const size_t row_bytes = hop.hidden * item_bytes(header.dtype);
  if (filled > wanted || header.sequence != shard.sequence) {
    shard.status = kBroken;
  } else if (header.kind == kError) {
    shard.status = kRefused;
  } else if (header.kind != kReply || header.rows != shard.num_rows ||
             header.extra != hop.hidden || header.body_bytes != header.rows * row_bytes ||
             header.dtype < kBFloat16 || header.dtype > kFloat32) {
    shard.status = kBroken;
  } else {
    shard.status = kDone;
  }
}

void add_answer(Hop& hop, const Shard& shard) {
  Header header;
  std::memcpy(&header, shard.in.data, sizeof header);
  const char* body = shard.in.data + sizeof header;
  float* sum = reinterpret_cast<float*>(hop.sum.data);
  const size_t h = hop.hidden;
  if (!hop.has_sum && shard.has_all_rows && header.dtype == kBFloat16) {
    set_bfloat16(sum, reinterpret_cast<const uint16_t*>(body), hop.num_rows * h);
    hop.has_sum = true;
    return;
  }
  if (!hop.has_sum) std::memset(sum, 0, hop.num_rows * h * 4);
  hop.has_sum = true;
  const uint32_t* rows = reinterpret_cast<const uint32_t*>(shard.rows.data);
  for (uint32_t i = 0; i < shard.num_rows; ++i) {
    float* to = sum + rows[i] * h;
    if (header.dtype == kBFloat16)
      add_bfloat16(to, reinterpret_cast<const uint16_t*>(body) + i * h, h);
    else if (header.dtype == kFloat16)
      add_float16(to, reinterpret_cast<const uint16_t*>(body) + i * h, h);
    else
      add_float32(to, reinterpret_cast<const float*>(body) + i * h, h);
  }
}

}  // namespace

extern "C" {

Hop* hop_new() { return new (std::nothrow) Hop; }

void hop_free(Hop* hop) { delete hop; }

void hop_set_socket(Hop* hop, int32_t shard, int32_t fd) { hop->shards[shard].fd = fd; }

int32_t hop_max_shards() { return kMaxShards; }

// Splits x [n, hidden] by shard and sends each its part. Returns the number of shards asked, or
// -1 when nothing was sent because an id is out of range, an expert has no shard, its shard no
// connection, or memory ran out. `owners` is routing/split.py's [1 + num_experts]. Sequences count on from `sequence`.
int32_t hop_send(Hop* hop, const char* x, const int32_t* ids, const float* weights, uint32_t n,
                 uint32_t hidden, uint16_t topk, uint8_t dtype, const int64_t* owners,
                 int32_t num_experts, int32_t num_shards, int32_t layer, uint64_t version,
                 uint32_t sequence, uint32_t flags, int64_t deadline_ns) {
  const size_t pairs = size_t(n) * topk;
  if (!hop->codes.reserve(8 * pairs) || !hop->ids.reserve(4 * pairs) ||
      !hop->weights.reserve(4 * pairs) || !hop->sum.reserve(size_t(4) * n * hidden))
    return -1;
  std::memcpy(hop->ids.data, ids, 4 * pairs);
  std::memcpy(hop->weights.data, weights, 4 * pairs);
  int64_t* codes = reinterpret_cast<int64_t*>(hop->codes.data);
  bool is_asked[kMaxShards] = {};
  for (size_t i = 0; i < pairs; ++i) {
    if (ids[i] < -1 || ids[i] >= num_experts) return -1;
    codes[i] = owners[ids[i] + 1];
    if (codes[i] == kUnservedCode) return -1;
    if (codes[i] == kNotAskedCode) continue;
    const int64_t shard = codes[i] - kFirstShardCode;
    if (hop->shards[shard].fd < 0) return -1;
    is_asked[shard] = true;
  }
  hop->num_rows = n;
  hop->hidden = hidden;
  hop->topk = topk;
  hop->flags = flags;
  hop->dtype = dtype;
  hop->has_sum = false;
  hop->bytes_sent = hop->bytes_received = hop->wait_ns = 0;
  int32_t asked = 0;
  for (int32_t s = 0; s < num_shards; ++s) {
    Shard& shard = hop->shards[s];
    shard.status = kIdle;
    if (!is_asked[s]) continue;
    shard.sequence = sequence + uint32_t(asked++);
    post(*hop, shard, s + kFirstShardCode, x, ids, weights, codes, topk, layer, version,
         deadline_ns);
  }
  return asked;
}

// Waits for all answers and writes their sum, in the rows' type, to out [n, hidden]. Returns how
// many shards failed; `out` is written only when none did. The sum so far is `hop_sum`.
int32_t hop_receive(Hop* hop, void* out, int32_t num_shards, int64_t deadline_ns) {
  pollfd waiting[kMaxShards];
  int32_t failed = 0;
  for (;;) {
    nfds_t count = 0;
    int32_t index[kMaxShards];
    for (int32_t s = 0; s < num_shards; ++s) {
      if (hop->shards[s].status != kWaiting) continue;
      index[count] = s;
      waiting[count++] = {hop->shards[s].fd, POLLIN, 0};
    }
    if (count == 0) break;
    const int64_t started_ns = now_ns();
    const int wait_ms = remaining_ms(deadline_ns);
    const int ready = poll(waiting, count, wait_ms);
    hop->wait_ns += now_ns() - started_ns;
    if (ready < 0 && errno == EINTR) continue;
    for (nfds_t i = 0; i < count; ++i) {
      Shard& shard = hop->shards[index[i]];
      if (ready <= 0) {
        if (remaining_ms(deadline_ns) == 0) shard.status = kLate;
      } else if (waiting[i].revents != 0) {
        receive(*hop, shard, deadline_ns);
        if (shard.status == kDone) add_answer(*hop, shard);
      }
    }
  }
  for (int32_t s = 0; s < num_shards; ++s) failed += hop->shards[s].status > kDone;
  if (failed) return failed;
  const size_t size = size_t(hop->num_rows) * hop->hidden;
  if (!hop->has_sum) {
    std::memset(out, 0, size * item_bytes(hop->dtype));
  } else if (hop->dtype == kBFloat16) {
    narrow(static_cast<uint16_t*>(out), reinterpret_cast<const float*>(hop->sum.data), size);
  } else {
    std::memcpy(out, hop->sum.data, size * 4);
  }
  return 0;
}

int32_t hop_status(const Hop* hop, int32_t shard) { return hop->shards[shard].status; }
int32_t hop_error(const Hop* hop, int32_t shard) { return hop->shards[shard].error; }

// The body of the error frame of a shard whose status is kRefused.
const char* hop_refusal(const Hop* hop, int32_t shard, uint32_t* size) {
  Header header;
  std::memcpy(&header, hop->shards[shard].in.data, sizeof header);
  *size = header.body_bytes;
  return hop->shards[shard].in.data + sizeof header;
}

// int32 and float32 [n, topk], as `hop_send` was given them.
const int32_t* hop_ids(const Hop* hop) { return reinterpret_cast<const int32_t*>(hop->ids.data); }
const float* hop_weights(const Hop* hop) {
  return reinterpret_cast<const float*>(hop->weights.data);
}

// float32 [n, hidden]: the answers that did arrive; nullptr before the first.
const float* hop_sum(const Hop* hop) {
  return hop->has_sum ? reinterpret_cast<const float*>(hop->sum.data) : nullptr;
}

// bytes sent, bytes received, nanoseconds waited since `hop_send`.
void hop_counts(const Hop* hop, int64_t* counts) {
  counts[0] = hop->bytes_sent;
  counts[1] = hop->bytes_received;
  counts[2] = hop->wait_ns;
}

// Splits the time that each shard spent over the (row, expert) pairs that it was asked for, and
// adds each row's share to busy_ns [n] and, at the shard's price [num_shards], to money [n].
void hop_add_costs(const Hop* hop, int32_t num_shards, const double* prices, double* busy_ns,
                   double* money) {
  const int64_t* codes = reinterpret_cast<const int64_t*>(hop->codes.data);
  const size_t pairs = size_t(hop->num_rows) * hop->topk;
  int64_t count[kMaxShards] = {};
  double share[kMaxShards] = {};
  for (size_t i = 0; i < pairs; ++i)
    if (codes[i] >= kFirstShardCode) ++count[codes[i] - kFirstShardCode];
  for (int32_t s = 0; s < num_shards; ++s) {
    if (hop->shards[s].status != kDone || count[s] == 0) continue;
    Header header;
    std::memcpy(&header, hop->shards[s].in.data, sizeof header);
    share[s] = double(header.busy_ns) / double(count[s]);
  }
  for (uint32_t row = 0; row < hop->num_rows; ++row) {
    for (uint16_t k = 0; k < hop->topk; ++k) {
      const int64_t code = codes[size_t(row) * hop->topk + k];
      if (code < kFirstShardCode) continue;
      const double spent = share[code - kFirstShardCode];
      busy_ns[row] += spent;
      money[row] += spent * prices[code - kFirstShardCode];
    }
  }
}

}  // extern "C"
