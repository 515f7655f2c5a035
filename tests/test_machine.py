import pytest
import torch

import train


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(call_main, tmp_path, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"{device} is there")
    status, _, errors = call_main(train, "--dataset", "digits", "--device", device, "--save", tmp_path / "run")
    assert (status, f"--device {device}: this machine has none" in errors) == (2, True)
