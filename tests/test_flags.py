import train
from densenet import DenseNet
from flags import model_arguments, parse_args


def parse(*arguments):
    return parse_args(train.build_parser(), list(arguments))


def test_defaults_that_depend_on_others():
    assert parse("--no-augment").drop_rate == 0.2
    assert parse("--no-augment", "--drop-rate", "0").drop_rate == 0
    assert parse().drop_rate == 0
    svhn = parse("--dataset", "svhn")
    assert (svhn.epochs, svhn.val, svhn.augment, svhn.drop_rate) == (40, 6000, False, 0.2)
    assert parse("--dataset", "svhn", "--epochs", "3", "--val", "0").epochs == 3
    plain = DenseNet(**model_arguments(parse("--no-bottleneck", "--depth", "40")))
    assert sum(p.numel() for p in plain.parameters()) == 1_019_722
    assert parse("--nEpochs", "7", "--batchSz", "8", "--no-cuda").device == "cpu"
