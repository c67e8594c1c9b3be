"""The question whether KVM works: where there is none to ask, and that it leaves no trace."""

import os

from agent.vmm import kvm


def test_without_a_device_there_is_no_kvm(tmp_path):
    assert kvm.refusal(str(tmp_path / "kvm")) == f"there is no {tmp_path}/kvm"


def test_another_device_is_not_kvm():
    assert kvm.refusal("/dev/null").startswith("/dev/null makes no VM: ")


def test_the_answer_is_the_same_each_time_and_leaves_nothing_open():
    first = kvm.refusal()
    before = os.listdir("/proc/self/fd")
    assert kvm.refusal() == first
    assert os.listdir("/proc/self/fd") == before
