"""Protocols have one name each, and options in it."""

import pytest

from vlm4vla.errors import UserError
from vlm4vla.sims.protocols import protocol, protocol_names


def test_options_make_a_protocol_of_their_own():
    plain, own = protocol("libero_10/v1"), protocol("libero_10/v1+ensemble=0.01+execute=1")
    assert (own.ensemble, own.execute, plain.ensemble, plain.execute) == (0.01, 1, None, 4)
    assert own.to_dict() == {**plain.to_dict(), "name": own.name, "ensemble": 0.01, "execute": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("libero_1/v1", "nearest: libero_10/v1"),
        ("libero_10/v1+execute=0", "execute=<steps"),
        ("libero_10/v1+ensemble=-1", "ensemble=<decay"),
        ("libero_10/v1+ensemble=nan", "ensemble=<decay"),
        ("libero_10/v1+steps=3", "the option 'steps=3'"),
        ("libero_10/v1+execute=08", r"libero_10/v1\+execute=8"),
        ("libero_10/v1+execute=8+ensemble=0.1", r"libero_10/v1\+ensemble=0.1\+execute=8"),
        ("libero_10/v1+execute=8+execute=4", r"once each"),
    ],
)
def test_one_protocol_has_one_name(name, message):
    with pytest.raises(UserError, match=message):
        protocol(name)


def test_every_listed_name_is_a_protocol():
    for name in protocol_names():
        assert protocol(name).name == name
        assert protocol(name).success_rule


def test_what_was_recorded_before_keeps_its_identity():
    """Fields that came later are not in a protocol that does not use them: recordings are found by this."""
    keys = {"name", "sim", "sim_args", "first_seed", "max_steps", "execute", "success_rule"}
    assert set(protocol("grinningface/place/train/v1").to_dict()) == keys
