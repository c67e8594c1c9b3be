import tarfile
from pathlib import Path

import pytest

from agent.model.errors import Damaged
from agent.model.vmstate import check_vmstate, crc64

SAMPLE = Path(__file__).parents[1] / "data/cocoon/cocoon-0.3.6-firecracker.tar"


def vmstate():
    with tarfile.open(SAMPLE) as tar:
        return tar.extractfile("vmstate").read()


def test_the_checksum_is_the_one_that_firecracker_tests():
    # src/vmm/src/snapshot/crc.rs
    assert crc64(bytes([1, 2, 3, 4, 5])) == 0xFB0460DE06383654
    assert crc64(bytes([123] * 16)) == 0x29D5357216326566
    assert crc64(b"") == 0


def test_a_real_state_is_whole():
    check_vmstate(vmstate())


@pytest.mark.parametrize("place", [0, 9, 5000, -9, -1])
def test_a_bit_that_turned_is_noticed(place):
    state = bytearray(vmstate())
    state[place] ^= 4
    with pytest.raises(Damaged):
        check_vmstate(bytes(state))


@pytest.mark.parametrize("length", [0, 7, 8, 100, 16000])
def test_a_state_cut_short_is_noticed(length):
    with pytest.raises(Damaged):
        check_vmstate(vmstate()[:length])
