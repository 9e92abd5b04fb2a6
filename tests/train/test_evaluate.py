"""The metrics: Fréchet distance against closed forms, the classifier, the whole evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.train.checkpoint import save_weights
from flowkernels.train.classifier import cached_classifier, train_classifier
from flowkernels.train.data import load_digits
from flowkernels.train.errors import UsageError
from flowkernels.train.evaluate import EvaluateConfig, evaluate
from flowkernels.train.export import load_model
from flowkernels.train.files import write_json
from flowkernels.train.frechet import frechet_distance, gaussian_frechet_distance
from flowkernels.train.pictures import save_grid, tile
from flowkernels.train.sampling import SampleConfig, sample_images


def test_frechet_distance_of_commuting_gaussians() -> None:
    """Diagonal covariances: `Σ (μ-ν)² + Σ (σ-τ)²`, exactly."""
    random = np.random.default_rng(0)
    mean_a, mean_b = random.normal(size=(2, 7))
    std_a, std_b = random.uniform(0, 3, size=(2, 7))
    got = gaussian_frechet_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    assert got == pytest.approx(expected, rel=1e-12)  # float64, seven dimensions


def test_frechet_distance_of_any_gaussians() -> None:
    """Against scipy's general matrix square root, and against the optimal map's closed form."""
    from scipy.linalg import sqrtm

    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 12, 12))
    cov_a, cov_b = a @ a.T + np.eye(12), b @ b.T + np.eye(12)
    got = gaussian_frechet_distance(np.zeros(12), cov_a, np.ones(12), cov_b)
    expected = 12 + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert got == pytest.approx(expected, rel=1e-9)
    # If x ~ N(0, A) and y = S x with S symmetric positive, then W² = E‖x - Sx‖² = tr((I-S)A(I-S)).
    s = b @ b.T / 12 + 0.1 * np.eye(12)
    got = gaussian_frechet_distance(np.zeros(12), cov_a, np.zeros(12), s @ cov_a @ s)
    rest = np.eye(12) - s
    assert got == pytest.approx(np.trace(rest @ cov_a @ rest), rel=1e-9)


def test_frechet_distance_of_samples() -> None:
    random = np.random.default_rng(2)
    x = random.normal(size=(500, 5))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(20, rel=1e-9)
    assert frechet_distance(x, 3 * x) == pytest.approx(frechet_distance(3 * x, x), rel=1e-9)
    # A feature that never fires makes the covariance singular.
    dead = x * np.array([1, 1, 1, 1, 0])
    assert frechet_distance(dead, dead + 1) == pytest.approx(5, rel=1e-9)
    with pytest.raises(ValueError, match=r"features_b: got shape \(500, 4\)"):
        frechet_distance(x, x[:, :4])


def test_classifier_is_accurate_deterministic_and_cached(tmp_path: Path) -> None:
    train, test = load_digits("train"), load_digits("test")
    images = train.images(torch.arange(len(train)))
    state = torch.get_rng_state()
    model = train_classifier(images, train.labels, 10)
    assert torch.equal(torch.get_rng_state(), state)  # drew from a generator of its own
    features, predicted = model.judge(test.images(torch.arange(len(test))))
    assert features.shape == (359, 64)
    # 359 unseen digits; 0.989 was seen. Below 0.96 it would not be fit to judge.
    assert (predicted == test.labels).double().mean() > 0.96
    first = cached_classifier(tmp_path, train)
    again = cached_classifier(tmp_path, train)
    for a, b, c in zip(model.parameters(), first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    # A damaged cache, or one of other data, is made anew.
    (tmp_path / "classifier.safetensors").write_bytes(b"junk")
    assert torch.equal(cached_classifier(tmp_path, train).head.weight, first.head.weight)


def write_run(folder: Path, one_step: dict[str, float] | None = None, classes: int = 10) -> Path:
    """A finished run of an untrained network."""
    torch.manual_seed(0)
    config = MMDiTConfig(8, in_channels=1, dim=16, depth=1, heads=1, num_classes=classes)
    network = MMDiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # the fresh network's output is zero
    info = {
        "format": 1,
        "network": "MMDiT",
        "config": config.to_dict(),
        "method": "FGM" if one_step else "FlowMatching",
        "one_step": one_step,
        "data": {"kind": "digits", "split": "test"},
        "step": 1,
    }
    write_json(folder / "model.json", info)
    save_weights(folder / "weights.safetensors", network.state_dict())
    return folder


def test_generate_follows_the_formulas(tmp_path: Path) -> None:
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    flow = load_model(write_run(tmp_path / "flow"))
    network = flow.network
    half = noise - 0.5 * network(noise, torch.ones(3), labels=labels)
    expected = half - 0.5 * network(half, torch.full((3,), 0.5), labels=labels)
    torch.testing.assert_close(flow.generate(noise, 2, labels), expected, rtol=1e-5, atol=1e-5)
    student = load_model(write_run(tmp_path / "student", {"t_star": 0.9, "sigma_star": 0.8}))
    z = 0.8 * noise
    expected = z - 0.8 * network(z, torch.full((3,), 0.9), labels=labels)
    torch.testing.assert_close(student.generate(noise, 1, labels), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="a one-step generator needs 1"):
        student.generate(noise, 2, labels)
    with pytest.raises(UsageError, match="this model needs labels"):
        flow.generate(noise, 1)


def test_guidance_combines_two_velocities(tmp_path: Path) -> None:
    flow = load_model(write_run(tmp_path))
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([4, 5])
    ones = torch.ones(2)
    v, v_uncond = (flow.network(noise, ones, labels=c) for c in (labels, torch.tensor([10, 10])))
    expected = noise - (v_uncond + 3 * (v - v_uncond))
    got = flow.generate(noise, 1, labels, guidance=3.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_evaluate_writes_table_json_and_picture(tmp_path: Path) -> None:
    teacher = write_run(tmp_path / "teacher")
    student = write_run(tmp_path / "student", {"t_star": 1.0, "sigma_star": 1.0})
    output = tmp_path / "out"
    config = EvaluateConfig(
        teacher=str(teacher),
        student=str(student),
        output=str(output),
        steps=(1, 2),
        samples=40,
        device="cpu",
    )
    console = Console(record=True, width=100)
    rows = evaluate(config, console)
    assert [(row.name, row.steps) for row in rows] == [
        ("real vs real", None),
        ("teacher", 1),
        ("teacher", 2),
        ("student", 1),
    ]
    real, one, _, generator = rows
    assert real.accuracy > 0.99  # the classifier was trained on these
    # The same weights and noises: one Euler step is the one-step generator with t* = σ* = 1.
    assert generator.accuracy == one.accuracy
    assert generator.frechet == pytest.approx(one.frechet, rel=1e-4)
    assert one.frechet > real.frechet
    assert one.seconds_per_1000 is not None
    text = console.export_text()
    for word in ("student", "class accuracy", "Fréchet distance", "1,000 images"):
        assert word in text
    result = json.loads((output / "results.json").read_text())
    assert result["rows"][3]["name"] == "student"
    # 40 samples against 359 digits, from halves of 179 and 180.
    expected = real.frechet * (1 / 40 + 1 / 359) / (1 / 179 + 1 / 180)
    assert result["frechet_floor"] == pytest.approx(expected, rel=1e-12)
    picture = Image.open(output / "samples.png")
    # Three rows of twenty 8x8 images, one pixel apart, six times enlarged.
    assert picture.size == ((20 * 9 - 1) * 6, (3 * 9 - 1) * 6)


def test_sample_command_draws_the_classes_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = sample_images(SampleConfig(run=str(run), steps=2, labels=(3, 8), rows=4, device="cpu"))
    assert path == run / "samples.png"
    assert Image.open(path).size == (17 * 6, 35 * 6)
    with pytest.raises(UsageError, match=r"labels: got \(11,\), needs classes 0 to 9"):
        sample_images(SampleConfig(run=str(run), labels=(11,), device="cpu"))
    with pytest.raises(UsageError, match=r"ends in \.png"):
        sample_images(SampleConfig(run=str(run), output=str(tmp_path / "x.gif"), device="cpu"))


def test_missing_and_damaged_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.json: cannot be read \(No such file"):
        load_model(tmp_path / "nowhere")
    run = write_run(tmp_path / "run")
    (run / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"weights\.safetensors: damaged"):
        load_model(run)
    (run / "weights.safetensors").unlink()
    with pytest.raises(UsageError, match=r"weights\.safetensors: missing"):
        load_model(run)
    (run / "model.json").write_text("{")
    with pytest.raises(UsageError, match=r"model\.json: damaged"):
        load_model(run)


def test_students_of_other_classes_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "teacher")
    write_run(tmp_path / "student", {"t_star": 1.0, "sigma_star": 1.0}, classes=3)
    config = EvaluateConfig(
        teacher=str(tmp_path / "teacher"), student=str(tmp_path / "student"), output=str(tmp_path)
    )
    with pytest.raises(UsageError, match="student: has 3 classes, the teacher 10"):
        evaluate(config)


def test_images_that_are_not_finite_are_a_row_without_figures(tmp_path: Path) -> None:
    write_run(tmp_path / "teacher")
    path = write_run(tmp_path / "student", {"t_star": 1.0, "sigma_star": 1.0})
    weights = load_model(path).network.state_dict()
    broken = {name: torch.full_like(w, float("nan")) for name, w in weights.items()}
    save_weights(path / "weights.safetensors", broken)
    config = EvaluateConfig(
        teacher=str(tmp_path / "teacher"), student=str(path), output=str(tmp_path / "judged"),
        steps=(1,), samples=20,
    )  # fmt: skip
    evaluate(config, Console(quiet=True))
    rows = json.loads((tmp_path / "judged" / "results.json").read_text())["rows"]
    assert rows[-1]["name"] == "student"
    assert (rows[-1]["accuracy"], rows[-1]["frechet"]) == (None, None)
    assert all(row["frechet"] is not None for row in rows[:-1])


@pytest.mark.parametrize(
    ("change", "named"), [({"guidance": float("nan")}, "guidance"), ({"seed": 2**64}, "seed")]
)
def test_settings_that_make_no_sense_are_named(change: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=f"{named}: got"):
        EvaluateConfig(**change).validate()  # type: ignore[arg-type]


def test_tile_places_and_clips(tmp_path: Path) -> None:
    images = torch.stack([torch.full((1, 2, 2), v) for v in (-2.0, 0.0, 1.0)])
    canvas = tile(images, columns=2)
    assert canvas.shape == (5, 5, 3)
    assert canvas[0, 0].tolist() == [0, 0, 0]
    assert canvas[0, 3].tolist() == [128, 128, 128]  # 127.5, to even
    assert canvas[3, 0].tolist() == [255, 255, 255]
    assert canvas[3, 3].tolist() == [128, 128, 128]  # no fourth image: the ground
    save_grid(tmp_path / "a" / "grid.png", images, 2)
    assert Image.open(tmp_path / "a" / "grid.png").size == (5 * 24, 5 * 24)


def test_frechet_bias_is_proportional_to_the_inverse_counts() -> None:
    """What the evaluation's floor relies on: same law, finite sets."""
    random = np.random.default_rng(3)

    def mean_distance(n: int, m: int) -> float:
        draws = [
            frechet_distance(random.normal(size=(n, 16)), random.normal(size=(m, 16)))
            for _ in range(20)
        ]
        return float(np.mean(draws))

    halves, whole = mean_distance(900, 900), mean_distance(2000, 1800)
    # First order in 1/n, and the mean of twenty draws: a tenth is three standard errors.
    assert whole / halves == pytest.approx((1 / 2000 + 1 / 1800) / (2 / 900), rel=0.1)
