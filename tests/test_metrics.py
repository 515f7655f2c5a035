import pytest
import torch

from metrics import predict


@pytest.mark.parametrize(("number", "size", "sizes"), [(600, 32, [250, 250, 100]), (70, 64, [62, 8]), (2, 1024, [1, 1])])
def test_large_images_are_evaluated_fewer_at_a_time(number, size, sizes):
    batches = []

    class Net(torch.nn.Module):
        def forward(self, images):
            batches.append(len(images))
            return images.mean(dim=(2, 3))

    images = torch.zeros(number, 3, size, size, dtype=torch.uint8)
    assert predict(Net(), images, torch.tensor(1.0), torch.tensor(2.0)).tolist() == [[-0.5] * 3] * number
    assert batches == sizes
