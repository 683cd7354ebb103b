"""`chgval embed` and `--frozen`: features as torchvision's own code makes them, and the same in one step."""

import io
import json
import os
import subprocess
import sys
from logging import WARNING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.datasets import ImageFolder

import chgval
from tests.commands import invoke
from tests.pictures import make_blobs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of odd sizes in three classes, one that cannot be read, and random weights of a ResNet-18."""
    root = tmp_path_factory.mktemp("photos")
    for seed in range(30):
        path = root / "photos" / ("cat", "dog", "emu")[seed % 3] / f"{seed:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_blobs(seed, 60 + seed).resize((60 + seed, 90)).save(path)
    (root / "photos/dog/broken.jpg").write_bytes(b"no picture")
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), root / "resnet18.pt")
    torch.save(torch.nn.Linear(3, 2).state_dict(), root / "other.pt")
    return root


def plain_features(root, transform):
    """Last-layer inputs, by name, as anybody would take them with torchvision."""
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(root / "resnet18.pt"))
    network.fc = torch.nn.Identity()
    network.eval()
    features = {}
    for path in sorted((root / "photos").glob("*/*.png")):
        with torch.inference_mode():
            image = transform(Image.open(path).convert("RGB"))
            features[f"{path.parent.name}/{path.name}"] = network(image[None])[0].numpy()
    return features


def test_features_are_those_of_torchvision(photos, tmp_path):
    args = ("--arch", "resnet18", "--weights", photos / "resnet18.pt", "-o", tmp_path / "e.parquet")
    result = invoke("embed", photos / "photos", *args)
    assert result.exit_code == 0, result.stderr
    assert "30 of 31 images, as 512 numbers each" in result.stderr and "dog/broken.jpg" in result.stderr
    table = pd.read_parquet(tmp_path / "e.parquet").set_index("id")
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    expected = plain_features(photos, transform)
    assert set(table.index) == {*expected, "dog/broken.jpg"} and table.embedding["dog/broken.jpg"] is None
    for name, features in expected.items():
        np.testing.assert_allclose(table.embedding[name], features, atol=1e-5)
    labels = {path.split("photos/")[-1]: label for path, label in ImageFolder(photos / "photos").samples}
    assert table.label.to_dict() == labels


def test_image_size_and_normalisation_can_be_given(photos, tmp_path):
    given = {"image_size": 112, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    chgval.embed(
        photos / "photos",
        output=tmp_path / "e.parquet",
        arch="resnet18",
        weights=photos / "resnet18.pt",
        **given,
    )
    table = pd.read_parquet(tmp_path / "e.parquet").set_index("id")
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(128),
            torchvision.transforms.CenterCrop(112),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(given["mean"], given["std"]),
        ]
    )
    for name, features in plain_features(photos, transform).items():
        np.testing.assert_allclose(table.embedding[name], features, atol=1e-5)


def test_a_frozen_network_gives_what_embed_and_value_give_to_the_bit(photos, tmp_path):
    network = ("--arch", "resnet18", "--weights", photos / "resnet18.pt", "--image-size", "64")
    assert invoke("embed", photos / "photos", *network, "-o", tmp_path / "e.parquet").exit_code == 0
    training = ("--epochs", "5", "--seed", "3")
    column = ("--features-column", "embedding", "-o", tmp_path / "two.parquet")
    result = invoke("value", tmp_path / "e.parquet", *column, *training)
    assert result.exit_code == 0, result.stderr
    result = invoke(
        "value", photos / "photos", "--frozen", *network, *training, "-o", tmp_path / "one.parquet"
    )
    assert result.exit_code == 0, result.stderr
    assert "linear" in result.stderr and "on resnet18, frozen" in result.stderr
    one, two = pq.read_table(tmp_path / "one.parquet"), pq.read_table(tmp_path / "two.parquet")
    same = [name for name in one.column_names if name != "reason"]
    assert one.select(same).equals(two.select(same))
    metadata = chgval.read_report(tmp_path / "one.parquet").metadata
    assert metadata["settings"]["train"]["arch"] == "resnet18" and metadata["settings"]["train"]["frozen"]
    embedded = ("--config", tmp_path / "one.parquet", "-o", tmp_path / "e.jsonl")
    result = invoke("embed", photos / "photos", *embedded)  # by the same network, which the report names
    assert result.exit_code == 0 and "by resnet18 on 64 pixels" in result.stderr, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert {line["id"].split("/")[0] for line in lines} == {line["label"] for line in lines}
    again = invoke(
        "value", photos / "photos", "--config", tmp_path / "one.parquet", "-o", tmp_path / "x.parquet"
    )
    assert again.exit_code == 0, again.stderr
    assert pq.read_table(tmp_path / "x.parquet")["value"].equals(one["value"])
    # Pictures are there for the page, as the dataset is one of images.
    assert chgval.report(tmp_path / "one.parquet", output=tmp_path / "r.html").num_pictures == 30


def test_training_on_a_frozen_network_is_tested_on_it_too(photos, tmp_path):
    settings = {"arch": "resnet18", "weights": photos / "resnet18.pt", "image_size": 64, "epochs": 20}
    trained = chgval.train(
        photos / "photos", output=tmp_path / "t", frozen=True, test=photos / "photos", **settings
    )
    assert trained.evaluation.accuracy > 0.9  # 30 samples, 512 numbers each: all are remembered


def test_a_model_of_chgval_says_all_that_is_to_be_known(photos, tmp_path):
    chgval.train(photos / "photos", output=tmp_path / "t", arch="resnet8", epochs=1, image_size=32)
    weights = tmp_path / "t/model.safetensors"
    result = invoke("embed", photos / "photos", "--weights", weights, "-o", tmp_path / "e.parquet")
    assert result.exit_code == 0 and "by resnet8 on 32 pixels" in result.stderr, result.stderr
    training = json.loads((tmp_path / "t/training.json").read_text())["settings"]["data"]
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(32),
            torchvision.transforms.CenterCrop(32),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(training["mean"], training["std"]),
        ]
    )
    state = load_file(weights)
    state.pop("fc.weight"), state.pop("fc.bias")
    from chgval.training.models import CIFARResNet

    network = CIFARResNet(1, 3)
    network.load_state_dict(state, strict=False)
    network.fc = torch.nn.Identity()
    network.eval()
    table = pd.read_parquet(tmp_path / "e.parquet").set_index("id")
    for path in sorted((photos / "photos").glob("*/*.png")):
        with torch.inference_mode():
            features = network(transform(Image.open(path).convert("RGB"))[None])[0]
        np.testing.assert_allclose(table.embedding[f"{path.parent.name}/{path.name}"], features, atol=1e-5)
    settings = {"weights": weights, "image_size": 32, "epochs": 1}
    report = chgval.value(photos / "photos", **settings)  # the architecture is read, and so is the rest
    assert report.metadata["settings"]["train"]["arch"] == "resnet8"
    np.testing.assert_allclose(report.metadata["settings"]["data"]["mean"], training["mean"], rtol=1e-5)


def test_several_annotators_and_unknown_labels_stay(tmp_path):
    rows = []
    for seed in range(12):
        file = io.BytesIO()
        make_blobs(seed, 24).save(file, "PNG")
        labels = {"one": "xyz"[seed % 3], "two": None if seed == 5 else "xyz"[(seed + seed % 2) % 3]}
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, **labels})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "r.safetensors")
    columns = {"label_column": ["one", "two"]}
    settings = {"arch": "resnet18", "weights": tmp_path / "r.safetensors", "image_size": 32}
    chgval.embed(tmp_path / "d.parquet", output=tmp_path / "e.parquet", **columns, **settings)
    report = chgval.value(tmp_path / "e.parquet", features_column="embedding", epochs=2, **columns)
    direct = chgval.value(tmp_path / "d.parquet", frozen=True, epochs=2, **columns, **settings)
    assert report.table.equals(direct.table) and "label_name_of_two" in report.table.column_names


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--weights", "none.pt"), 1, "--weights none.pt: no such file"),
        (("--arch", "resnet18", "--weights", "BEST"), 1, "of --arch resnet18 there are IMAGENET1K_V1"),
        (("--arch", "resnet8", "--weights", "DEFAULT"), 1, "--arch resnet8 has no weights of a name"),
        (("--weights", "{root}/other.pt"), 1, "does not say which network it is of; name it with --arch"),
        (("--arch", "resnet34", "--weights", "{root}/resnet18.pt"), 1, "does not fit --arch resnet34"),
        (("--arch", "resnet18", "--weights", "{root}/resnet18.pt", "-o", "e.csv"), 2, "CSV has no lists"),
        (
            (
                "--arch",
                "timm/no_such_model",
            ),
            1,
            "has no such model",
        ),
    ],
)
def test_wrong_networks_are_named(photos, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("embed", photos / "photos", *(arg.format(root=photos) for arg in args))
    if "timm" in message or "timm/" in str(args):
        pytest.importorskip("timm", reason="timm is not installed")
    assert result.exit_code == code and message in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_attempts_to_fetch_are_not_told_one_by_one(photos, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from huggingface_hub.utils import logging

    create_model, is_told = timm.create_model, []

    def create(*args: object, pretrained: bool = False, **options: object) -> object:
        if not pretrained:
            return create_model(*args, **options)
        is_told.append(logging.get_logger("huggingface_hub.http").isEnabledFor(WARNING))
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", create)
    before = logging.get_verbosity()
    args = ("--arch", "timm/resnet10t", "--weights", "DEFAULT", "-o", tmp_path / "e.parquet")
    result = invoke("embed", photos / "photos", *args)
    assert result.exit_code == 1 and "cannot be fetched (no route to host)" in result.stderr
    assert is_told == [False] and logging.get_verbosity() == before


def test_features_of_unreadable_images_are_unknown(photos, tmp_path):
    network = {"arch": "resnet18", "weights": photos / "resnet18.pt", "image_size": 32}
    report = chgval.value(
        photos / "photos",
        frozen=True,
        epochs=2,
        write_features=tmp_path / "f.npy",
        output=tmp_path / "v.parquet",
        **network,
    )
    known = np.isfinite(np.load(tmp_path / "f.npy")).all(1)
    assert known.tolist() == [status == "valued" for status in report["status"]] and not known.all()


def test_weights_that_make_no_numbers_are_named(photos, tmp_path):
    state = {
        name: tensor * torch.nan if tensor.is_floating_point() else tensor
        for name, tensor in torch.load(photos / "resnet18.pt").items()
    }
    torch.save(state, tmp_path / "nan.pt")
    args = (
        "--arch",
        "resnet18",
        "--weights",
        tmp_path / "nan.pt",
        "--image-size",
        "32",
        "-o",
        tmp_path / "e.parquet",
    )
    result = invoke("embed", photos / "photos", *args)
    assert result.exit_code == 1 and "nan.pt: the network makes no finite numbers" in result.stderr, (
        result.stderr
    )


@pytest.mark.parametrize("described", ['{"arch": 5}', '{"arch": "resnet18", "image_size": 32}', "[1]", "{"])
def test_a_strange_description_of_weights_is_none(photos, tmp_path, described):
    state = torchvision.models.resnet18().state_dict()
    save_file(state, tmp_path / "w.safetensors", {"chgval": described})
    settings = {"arch": "resnet18", "weights": tmp_path / "w.safetensors", "image_size": 32}
    assert chgval.embed(photos / "photos", output=tmp_path / "e.parquet", **settings).num_embedded == 30


def test_unreadable_images_fail_where_that_is_wanted(photos, tmp_path):
    network = ("--arch", "resnet18", "--weights", photos / "resnet18.pt", "--image-size", "32")
    for command in ("embed", "value"):
        frozen = ("--frozen",) if command == "value" else ()
        args = (*network, *frozen, "--on-error", "fail", "-o", tmp_path / "x.parquet")
        result = invoke(command, photos / "photos", *args)
        assert result.exit_code == 1 and "dog/broken.jpg" in result.stderr and "--on-error" in result.stderr


def test_networks_of_torchvision_are_recognised_by_their_weights(photos, tmp_path):
    network = torchvision.models.get_model("densenet121", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    settings = {"weights": tmp_path / "w.pt", "image_size": 32}
    assert chgval.embed(photos / "photos", output=tmp_path / "e.parquet", **settings).arch == "densenet121"


def test_a_first_layer_for_small_images_is_explained(photos):
    args = ("--arch", "resnet18", "--weights", photos / "resnet18.pt", "--image-size", "32", "-o", "-")
    result = invoke("value", photos / "photos", *args)
    assert result.exit_code == 1 and "Pass --frozen" in result.stderr and "conv1.weight" in result.stderr


def test_without_a_network_one_line_says_where_the_weights_go(photos, tmp_path):
    """The machine's own way to weights is closed: a proxy that nobody is."""
    environment = {
        **os.environ,
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "TORCH_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "chgval", "embed", photos / "photos", "-o", tmp_path / "e.parquet"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not (tmp_path / "e.parquet").exists()
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert "https://download.pytorch.org/models/resnet18" in line and f"put it at {tmp_path}" in line


def test_timm_networks_give_their_own_features(photos, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    settings = {"arch": "timm/resnet10t", "weights": tmp_path / "w.safetensors"}
    embedded = chgval.embed(photos / "photos", output=tmp_path / "e.parquet", **settings)
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    table = pd.read_parquet(tmp_path / "e.parquet").set_index("id")
    network.eval()
    image = Image.open(photos / "photos/cat/00.png").convert("RGB")
    with torch.inference_mode():
        hidden = network.forward_features(transform(image)[None])
        expected = network.forward_head(hidden, pre_logits=True)[0]
    np.testing.assert_allclose(table.embedding["cat/00.png"], expected, atol=1e-5)
    assert embedded.num_features == 512 and embedded.image_size == config["input_size"][-1]
