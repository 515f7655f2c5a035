import torch

from metrics import confusion_matrix


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    matrix = confusion_matrix(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0]), 3)
    assert matrix.tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]
