import numpy as np
import pytest
import torch

from metrics import confusion_matrix, mean_class_error, predict


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    matrix = confusion_matrix(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]), 3)
    assert matrix.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]


def test_the_mean_of_the_classes_errors_counts_each_class_alike():
    confusion = np.array([[9, 1, 0], [1, 1, 0], [0, 0, 0]])  # 1 of 10 wrong, 1 of 2, and a class without an image
    assert mean_class_error(confusion) == pytest.approx((0.1 + 0.5) / 2)


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
