"""``model.optim.name=adamw_8bit``: the update against torchao's and float64, what it holds, and trainings with it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.compose import configure
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model import layout
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA
from tests.nemo.grid_jobs import curve
from tests.nemo.test_grids import CHECKPOINTS

KEYS = ("model.optim.name=adamw_8bit", "model.megatron_amp_O2=true", "trainer.precision=bf16", "model.optim.lr=1e-2")
ALONE = (1, 1, False)
BETAS, DECAY = (0.9, 0.95), 0.1


@pytest.fixture(scope="module")
def lean():
    """The module, whose update runs uncompiled."""
    runtime.prepare()
    from nemo_minitron.nemo import lean

    with torch._dynamo.config.patch(disable=True):
        lean._compiled.cache_clear()
        yield lean
    lean._compiled.cache_clear()


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    """A model of the teacher's shape and vocabulary with other weights."""
    folder = tmp_path_factory.mktemp("student")
    return str(convert(make_llama(folder / "hf", GQA, seed=7), folder / "student.nemo"))


@pytest.fixture(scope="module")
def train(zygote, models, student) -> Callable[..., list[str]]:
    """Runs 8 steps of a command; each rank's digest of the weights that it ends with."""

    def train(command: str, folder: Path, *keys: str, ranks: int = 1, how: tuple = ()) -> list[str]:
        folder.mkdir(exist_ok=True)
        files = (student, str(models / "own_text_document"), str(folder))
        teacher = (f"model.kd_teacher_restore_from_path={models}/model.nemo",) if command == "distill" else ()
        extra = (*CHECKPOINTS, *teacher, *KEYS, *keys)
        return zygote.run("tests.nemo.lean_jobs:train", ranks, command, *files, ALONE, 8, extra, *how)

    return train


def weights_of(path: Path) -> dict[tuple[str, int | None], Tensor]:
    with NemoReader(path) as reader:
        return {(p.key, layer): reader.tensor(p, layer) for p, layer in layout.slots(reader.shape)}


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """Folder of a distillation of 8 steps that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train("distill", folder)
    return folder


def test_distillation_learns_and_leaves_a_student_of_bf16_values(whole, student):
    losses = curve(whole, "train_kd_loss")
    assert losses[7] < 0.7 * losses[0]
    before, after = weights_of(Path(student)), weights_of(whole / "trained.last.nemo")
    for key, tensor in after.items():
        assert torch.equal(tensor, tensor.bfloat16().to(tensor.dtype)), key
        assert not torch.equal(tensor, before[key].bfloat16().to(tensor.dtype)), key


@pytest.mark.slow
def test_a_killed_distillation_goes_on_as_if_nothing_had_happened(train, whole, tmp_path):
    """Killed in step 5 after a checkpoint at step 4: weights, moments and what is drawn, to the last bit."""
    with pytest.raises(RuntimeError, match="died"):
        train("distill", tmp_path, how=(5,))
    assert not (tmp_path / "trained.last.nemo").exists()
    train("distill", tmp_path)
    assert curve(tmp_path, "train_kd_loss") == curve(whole, "train_kd_loss")
    expected = weights_of(whole / "trained.last.nemo")
    for key, tensor in weights_of(tmp_path / "trained.last.nemo").items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.slow
def test_two_data_parallel_ranks_stay_alike_and_learn_what_one_does(train, whole, tmp_path):
    one, two = train("distill", tmp_path, ranks=2)
    assert one == two
    losses = curve(tmp_path, "train_kd_loss")
    assert losses[0] == pytest.approx(curve(whole, "train_kd_loss")[0], rel=1e-5)
    assert losses == pytest.approx(curve(whole, "train_kd_loss"), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("trainer.precision=32",), ("model.megatron_amp_O2=false",)], ids=str)
def test_fine_tuning_learns(train, tmp_path, keys):
    train("finetune", tmp_path, *keys)
    losses = curve(tmp_path, "train_lm_loss")
    assert losses[7] < 0.9 * losses[0]
    halves = [torch.equal(x, x.bfloat16().to(x.dtype)) for x in weights_of(tmp_path / "trained.last.nemo").values()]
    assert all(halves) if not keys else not any(halves)


# --------------------------------------------------------------------------------------------------- the update


def steps(lean, parameter: Tensor, gradients: list[Tensor], **options):
    """The parameter after a step with each of the gradients, and its optimizer."""
    parameter = torch.nn.Parameter(parameter.clone())
    optimizer = lean.LeanAdamW([parameter], **{"lr": 1e-2, "betas": BETAS, "weight_decay": DECAY} | options)
    for number, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)  # as a schedule sets it
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach().clone(), optimizer


def gradients(*size: int, number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    spread = torch.logspace(-4, 0, size[0]).view(-1, *[1] * (len(size) - 1))  # rows of very different sizes
    return [torch.randn(*size, generator=generator) * spread for _ in range(number)]


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_update_is_torchaos(lean, monkeypatch, pieces):
    """Of a float32 parameter: codes, and to a last bit or two the values and scales."""
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    start, given = torch.randn(48, 256, generator=torch.Generator().manual_seed(1)), gradients(48, 256)
    monkeypatch.setattr(lean, "PIECE", 48 // pieces)
    found, optimizer = steps(lean, start, given)
    theirs, moments = start.clone(), [OptimState8bit.zeros(start.shape, signed) for signed in (True, False)]
    for number, gradient in enumerate(given, start=1):
        step, rate = torch.tensor(float(number)), torch.tensor(1e-2 / number)
        single_param_adam(theirs, gradient, step, *moments, None, rate, *BETAS, DECAY, 1e-8, True, False)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-7)
    (state,) = optimizer.state.values()
    for name, moment in zip(lean.MOMENTS, moments, strict=True):
        assert torch.equal(state[name], moment.codes)
        torch.testing.assert_close(state[f"{name}_scale"], moment.scale, rtol=1e-6, atol=0)


def test_the_update_is_adamws_within_the_step_of_the_codes(lean):
    """Float64 from the moments as they were stored: the parameter, and each new moment to half the gap of its codes."""
    given = gradients(32, 512, number=4)
    before, optimizer = steps(lean, torch.randn(32, 512), given[:3])
    (state,) = optimizer.state.values()

    def moment(state: dict[str, Tensor], name: str, codes_map: Tensor) -> Tensor:
        return (codes_map.double()[state[name].long()].view(-1, 256) * state[f"{name}_scale"].double()[:, None]).view(
            32, 512
        )

    maps = lean._maps(before.device)
    held = [moment(state, name, codes) for name, codes in zip(lean.MOMENTS, maps, strict=True)]
    parameter, gradient = optimizer.param_groups[0]["params"][0], given[3].double()
    parameter.grad = given[3]
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    first = BETAS[0] * held[0] + (1 - BETAS[0]) * gradient
    second = BETAS[1] * held[1] + (1 - BETAS[1]) * gradient**2
    spread = (second / (1 - BETAS[1] ** 4)).sqrt() + 1e-8
    expected = before.double() * (1 - rate * DECAY) - rate * first / (1 - BETAS[0] ** 4) / spread
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)
    for name, codes, exact in zip(lean.MOMENTS, maps, (first, second), strict=True):
        scale = state[f"{name}_scale"].double()[:, None]
        torch.testing.assert_close(scale[:, 0], exact.view(-1, 256).abs().amax(1), rtol=1e-6, atol=0)
        nearest = (exact.view(-1, 256, 1) / scale[..., None] - codes.double()).abs().amin(-1).view(32, 512)
        error = (moment(state, name, codes) - exact).abs().view(-1, 256) / scale
        assert (error <= nearest.view(-1, 256) + 1e-6).all(), name


@pytest.mark.parametrize("shape", [(4096, 256), (60, 68)], ids=["8 bit", "float32 moments"])
def test_rounding_is_to_a_neighbour_and_unbiased(lean, shape):
    """Weight decay alone takes 1/1000 off 1, a quarter of the step of bf16 there; to the nearest it would be lost."""
    after, _ = steps(lean, torch.ones(shape).bfloat16(), [torch.zeros(shape)], weight_decay=DECAY)
    assert set(after.double().unique().tolist()) == {1.0, 1 - 2**-8}
    share, count = 1e-3 * 2**8, after.numel()
    deviation = (share * (1 - share) / count) ** 0.5
    assert abs(float((after != 1).double().mean()) - share) < 5 * deviation


def test_what_is_drawn_follows_from_seed_and_step(lean):
    """And torch's generator is left alone; so a state that was saved goes on as if it had not been."""
    start, given = torch.randn(64, 256).bfloat16(), gradients(64, 256, number=4)
    torch.manual_seed(1)
    once, whole = steps(lean, start, given, seed=3)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), drawn)
    assert torch.equal(steps(lean, start, given, seed=3)[0], once)
    assert not torch.equal(steps(lean, start, given, seed=4)[0], once)
    middle, optimizer = steps(lean, start, given[:3], seed=3)
    resumed = torch.nn.Parameter(middle.clone())
    other = lean.LeanAdamW([resumed], lr=1.0, betas=BETAS, weight_decay=DECAY, seed=3)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"], resumed.grad = 1e-2 / 4, given[3].bfloat16()
    other.step()
    assert torch.equal(resumed.detach(), once)
    for name, tensor in next(iter(whole.state.values())).items():
        assert torch.equal(other.state[resumed][name], tensor) and tensor.dtype in (torch.uint8, torch.float32)


def test_a_bf16_model_takes_six_bytes_a_parameter(lean):
    parameter = torch.nn.Parameter(torch.zeros(512, 1024).bfloat16())
    optimizer = lean.LeanAdamW([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [parameter.detach(), parameter.grad, *optimizer.state[parameter].values()]
    assert sum(tensor.nbytes for tensor in held) / parameter.numel() == pytest.approx(6 + 8 / 256)


def test_without_a_compiler_a_note_is_said_and_the_update_runs(lean, monkeypatch, capsys):
    def broken(*_, **__):
        def call(*_, **__):
            raise RuntimeError("no g++ here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    lean._compiled.cache_clear()
    with torch._dynamo.config.patch(disable=False):
        found, _ = steps(lean, torch.ones(32, 256).bfloat16(), gradients(32, 256))
    assert (
        "note: model.optim.name=adamw_8bit runs uncompiled, and more slowly: no g++ here\n" in capsys.readouterr().err
    )
    lean._compiled.cache_clear()
    assert torch.equal(found, steps(lean, torch.ones(32, 256).bfloat16(), gradients(32, 256))[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_once_it_takes_any_number_of_blocks(lean, dtype):
    """Float32 as uncompiled; after one step bf16, which draws otherwise, within the two neighbours."""
    shapes, number = [(48, 256), (16, 1024), (33, 512)], 3 if dtype == torch.float32 else 1
    plain = [steps(lean, torch.ones(shape, dtype=dtype), gradients(*shape, number=number))[0] for shape in shapes]
    lean._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(disable=False):
        compiled = [
            steps(lean, torch.ones(shape, dtype=dtype), gradients(*shape, number=number))[0] for shape in shapes
        ]
    lean._compiled.cache_clear()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for found, expected in zip(compiled, plain, strict=True):
        close = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-7, 0.0)}[dtype]
        torch.testing.assert_close(found, expected, rtol=close[0], atol=close[1])


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.tensor_model_parallel_size=2"], "needs model.tensor_model_parallel_size=1, found 2"),
        (["model.pipeline_model_parallel_size=2"], "take mcore_distributed_optim"),
        (["trainer.precision=16"], "model.optim.name=adamw_8bit rounds to bf16, and found trainer.precision=16"),
        (["model.optim.amsgrad=true"], "model.optim.amsgrad=true: expected model.optim.name=adam or adamw"),
        (["model.optim.capturable=true"], "model.optim.capturable"),
    ],
)
def test_what_it_cannot_go_with_is_refused(keys, said, monkeypatch):
    with pytest.raises(MinitronError, match=said):
        settled(*keys, monkeypatch=monkeypatch)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchao" else find(name))
    with pytest.raises(MinitronError, match=r"pip install 'nemo_minitron\[lean\]'"):
        settled(monkeypatch=monkeypatch)


def test_float32_weights_are_what_precision_32_means(monkeypatch, capsys):
    assert settled(monkeypatch=monkeypatch).model.megatron_amp_O2 is True
    assert settled("trainer.precision=32", monkeypatch=monkeypatch).model.megatron_amp_O2 is False
    assert "note: model.megatron_amp_O2=true: weights are float32" in capsys.readouterr().err


def settled(*keys: str, monkeypatch):
    """The config that NeMo is given of a fine-tuning with these keys, on a machine with a GPU that runs 16 bit."""
    from omegaconf import OmegaConf

    from nemo_minitron.nemo.settings import settle

    files = ["model.restore_from_path=a.nemo", "model.nemo_path=b.nemo", "model.data.data_prefix=[a]"]
    config = configure("finetune", [*files, *KEYS, "trainer.devices=2", *keys])
    monkeypatch.setattr(runtime, "has_cuda", lambda: True)
    return settle(OmegaConf.create(dataclasses.asdict(config)))
