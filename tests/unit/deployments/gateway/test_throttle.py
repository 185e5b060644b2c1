"""Wrong keys per address."""

from __future__ import annotations

from deployments.gateway.throttle import FailureThrottle


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_address_waits_until_its_minute_is_over() -> None:
    clock = Clock()
    throttle = FailureThrottle(3, clock)
    for _ in range(3):
        assert throttle.wait_s("1.2.3.4") == 0
        throttle.failed("1.2.3.4")
    clock.now_s = 20.5
    assert throttle.wait_s("1.2.3.4") == 40
    assert throttle.wait_s("1.2.3.5") == 0
    clock.now_s = 60
    assert throttle.wait_s("1.2.3.4") == 0
    throttle.failed("1.2.3.4")
    assert throttle.wait_s("1.2.3.4") == 0


def test_an_ipv6_host_has_one_count_for_all_its_addresses() -> None:
    throttle = FailureThrottle(2, Clock())
    throttle.failed("2001:db8::1")
    throttle.failed("2001:db8::ffff:2")
    assert throttle.wait_s("2001:db8::3") > 0
    assert throttle.wait_s("2001:db8:0:1::3") == 0


def test_an_ipv4_address_is_the_same_in_ipv6_clothes_or_not_another_hosts() -> None:
    throttle = FailureThrottle(1, Clock())
    throttle.failed("::ffff:1.2.3.4")
    assert throttle.wait_s("::ffff:1.2.3.4") > 0
    assert throttle.wait_s("::ffff:1.2.3.5") == 0


def test_the_table_is_bounded() -> None:
    throttle = FailureThrottle(1, Clock(), max_addresses=100)
    for number in range(1000):
        throttle.failed(f"10.0.{number // 256}.{number % 256}")
    assert len(throttle._windows) == 100
    assert throttle.wait_s("10.0.3.231") > 0
