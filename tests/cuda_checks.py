"""What must hold on a CUDA device: plain functions, so that they also run where there is no pytest.

Each takes a small folder of images (`tests.pictures.write_folder`), and raises AssertionError.
"""

import gc
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch

from chgval.config import DataConfig, TrainConfig, ValueConfig
from chgval.data import loader
from chgval.runs import session
from chgval.runs.session import make_valuing, prepare, read_dataset
from chgval.training import graph
from chgval.training.devices import cudnn_settings, device_settings
from chgval.training.records import EpochRecord, PlainRecord, SplitRecord
from chgval.training.strategies import REGISTRY, Predictions, Question
from chgval.valuation.closed_form import Factors, chg_values


def run_on(source, device, mode="online", image_size=None, **settings):
    """Prepare a run and its trainer; return both and the accumulator."""
    data = DataConfig(source=str(source), image_size=image_size)
    settings = {"arch": "resnet8", "epochs": 2, "augment": "none", "batch_size": 8, **settings}
    config = ValueConfig(data=data, train=TrainConfig(device=device, **settings), mode=mode)
    run = prepare(config.data, config.train, read_dataset(config.data, config.train))
    accumulator, _, trainer = make_valuing(run, config)
    return run, accumulator, trainer


def first_values(source, device, mode="online", **settings):
    """Values of the first epoch, which starts from the same weights everywhere."""
    _, _, trainer = run_on(source, device, mode, **settings)
    return next(r.signals.value_N for r in trainer.records() if isinstance(r, EpochRecord))


def all_values(source, **settings):
    """Values of a run of three epochs in float32 on the GPU, and what else it told."""
    # With kernels only that give the same each time.
    with device_settings(torch.device("cuda"), "float32"), cudnn_settings(deterministic=True):
        _, accumulator, trainer = run_on(
            source, "cuda", epochs=3, augment="crop-flip", precision="float32", **settings
        )
        records = [r for r in trainer.records() if isinstance(r, PlainRecord | SplitRecord)]
        return accumulator.run_signals().value_N, records


def assert_close(found_N, expected_N, share=1e-3):
    np.testing.assert_allclose(found_N, expected_N, rtol=10 * share, atol=share * np.abs(expected_N).max())


def check_values_in_float32_are_those_of_the_cpu(folder):
    with device_settings(torch.device("cuda"), "float32"):
        for mode in ("online", "exact"):
            on_cpu = first_values(folder, "cpu", mode, precision="float32")
            assert_close(first_values(folder, "cuda", mode, precision="float32"), on_cpu)


def error_of(folder, device, precision):
    """How far the values of a pass in half precision are from those in float32, beside their spread.

    The pass before the first epoch, without training: rounding is all that differs.
    """
    exact = first_values(folder, "cpu", "exact", precision="float32")
    found = first_values(folder, device, "exact", precision=precision)
    return float(np.sqrt((((found - exact) / exact.std()) ** 2).mean()))


def check_values_in_half_precision_are_as_far_off_as_their_digits_say(folder):
    """Bfloat16 as on the CPU; float16 has three bits more."""
    on_cpu = error_of(folder, "cpu", "bfloat16")
    assert error_of(folder, "cuda", "float16") <= on_cpu / 2
    if torch.cuda.get_device_capability() >= (8, 0):
        assert error_of(folder, "cuda", "bfloat16") <= 2 * on_cpu


def check_captured_steps_give_the_values_of_plain_ones(folder):
    captured, told = all_values(folder)
    assert not told, told
    with patch.object(graph, "WARM_UP_STEPS", 10**9):
        plain, _ = all_values(folder)
    assert_close(captured, plain)


def check_samples_and_buffers_on_the_host_give_the_same_values(folder):
    near, _ = all_values(folder)
    with ExitStack() as stack:
        stack.enter_context(patch.object(loader, "DEVICE_MEMORY_SHARE", 0))
        stack.enter_context(patch.object(session, "ACCUMULATOR_MEMORY_SHARE", 0))
        _, accumulator, _ = run_on(folder, "cuda")
        assert accumulator.device.type == "cpu"
        far, told = all_values(folder)
    assert not told, told
    assert_close(far, near)


def check_no_step_waits_for_the_device(folder):
    """Between two readings of the losses no operation synchronises: plain, captured, and from the host."""
    for samples, buffers in ((0.5, 0.25), (0, 0.25), (0.5, 0)):
        with (
            patch.object(loader, "DEVICE_MEMORY_SHARE", samples),
            patch.object(session, "ACCUMULATOR_MEMORY_SHARE", buffers),
        ):
            _, _, trainer = run_on(folder, "cuda", epochs=1, batch_size=4)

            def is_stopped(trainer=trainer):
                step = trainer.position[1]
                is_checked = step in (1, 2, 6, 7, 8)  # the fourth step of each size is captured, which waits
                torch.cuda.set_sync_debug_mode("error" if is_checked else "default")
                return step == 9

            try:
                assert list(trainer.records(is_stopped)) == []
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert trainer.position == (0, 9)


def check_a_run_survives_with_too_little_memory(folder):
    """With six tenths of what a step takes, batches are shown in parts, and every sample is valued."""
    settings = {"arch": "resnet18", "batch_size": 40, "epochs": 6, "image_size": 64}
    _, _, trainer = run_on(folder, "cuda", **settings)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    list(trainer.records())
    step_bytes = torch.cuda.max_memory_allocated() - before
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    _, accumulator, trainer = run_on(folder, "cuda", **settings)
    allowed = torch.cuda.memory_reserved() + 0.6 * step_bytes
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        told = [r for r in trainer.records() if isinstance(r, SplitRecord)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert told, f"no batch was split, with {allowed:,.0f} bytes"
    signals = accumulator.run_signals()
    assert (signals.num_epochs_N == 6).all() and np.isfinite(signals.value_N).all()


def check_the_closed_form_equals_the_cpu(_):
    generator = torch.Generator().manual_seed(0)
    for num_samples, num_classes, width in ((20_000, 10, 64), (100_000, 20, 128)):
        residuals_NC = torch.randn(num_samples, num_classes, generator=generator)
        features_ND = torch.rand(num_samples, width, generator=generator)
        on_cpu = chg_values(Factors(residuals_NC.double(), features_ND.double()))
        on_cuda = chg_values(Factors(residuals_NC.cuda(), features_ND.cuda())).cpu()
        assert (on_cuda - on_cpu).abs().max() <= 1e-5 * on_cpu.std(), num_samples


def check_strategies_choose_as_on_the_cpu(_):
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(600) % 3
    logits_NC = torch.randn(600, 3, generator=generator)
    features_ND = torch.rand(600, 8, generator=generator)
    for name in ("chg", "gradient", "hardness", "el2n", "glister", "gradmatch", "auto"):
        if name not in REGISTRY:
            continue
        chosen = []
        for device in ("cpu", "cuda"):
            samples = Predictions(logits_NC.to(device), features_ND.to(device), labels_N.to(device))
            choice = REGISTRY[name].choose(
                Question(
                    labels_N=labels_N,
                    num_classes=3,
                    count=200,
                    epoch=5,
                    num_epochs=10,
                    batch_size=20,
                    lr=0.1,
                    generator=torch.Generator().manual_seed(1),
                    predict_samples=lambda samples=samples: samples,
                    predict_averaged=lambda samples=samples: samples,
                    predict_held=lambda samples=samples: samples,
                )
            )
            chosen.append(set(choice.positions_K.tolist()))
        assert len(chosen[0] & chosen[1]) >= 198, name


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
