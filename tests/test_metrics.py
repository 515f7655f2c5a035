import copy
import math
from types import SimpleNamespace

import pytest
import torch

from densenet import DenseNet
from metrics import batch_size, loss_and_error_sums, predict


@pytest.mark.parametrize(("number", "size", "sizes"), [(600, 32, [250, 250, 100]), (70, 64, [62, 8]), (2, 1024, [1, 1])])
def test_large_images_are_evaluated_fewer_at_a_time(number, size, sizes):
    batches = []

    class Net(torch.nn.Module):
        def forward(self, images):
            batches.append(len(images))
            return images.mean(dim=(2, 3))

    images = torch.zeros(number, 3, size, size, dtype=torch.uint8)
    assert predict(Net(), images, torch.tensor(-1.0), torch.tensor(1024.0)).tolist() == [[1 / 1024] * 3] * number
    assert batches == sizes


@pytest.mark.parametrize(
    ("arguments", "size", "gibibytes", "number"),
    [
        (dict(depth=100), 32, 8, 794),
        (dict(depth=100), 64, 24, 198),
        (dict(depth=100), 32, 79.1, 1588),
        (dict(depth=100), 32, 139.8, 3177),
        (dict(depth=100), 32, 268, 3177),
        (dict(depth=190, growth_rate=40), 32, 16, 121),
        ({"depth": 10}, 4096, 16, 1),
    ],
)
def test_on_a_gpu_the_net_and_the_memory_decide_how_many_images_it_gets(monkeypatch, arguments, size, gibibytes, number):
    memory = SimpleNamespace(total_memory=int(gibibytes * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    with torch.device("meta"):
        net = DenseNet(**arguments)
    assert batch_size(net, SimpleNamespace(shape=(10_000, 3, size, size), device=torch.device("cuda"))) == number


def test_a_net_answers_as_in_evaluation_and_keeps_its_statistics():
    """Also a net that was being trained: each answer is that to the image alone."""
    torch.manual_seed(0)
    net = DenseNet(depth=10, growth_rate=4, drop_rate=0.5).train()
    net.dense1[0].bn1.running_mean.add_(0.3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.full((3, 1, 1), 100.0), torch.full((3, 1, 1), 50.0)
    logits = predict(net, images, mean, std)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    twin = copy.deepcopy(net).double().eval()
    alone = torch.cat([twin((image[None].double() - 100) / 50) for image in images])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_sums_are_over_all_rows():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    loss, wrong = loss_and_error_sums(logits, torch.tensor([0, 0, 1])).tolist()
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)) + math.log(1 + math.exp(-3))
    assert loss == pytest.approx(expected, rel=1e-14)
    assert wrong == 1
