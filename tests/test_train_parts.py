"""The parts of training alone: losses, weight decay, the switch, evaluation."""

import numpy as np
import pytest
import torch
from torch import nn

from deepshare import data, models
from deepshare.nn import LearnedMask, SharedReLU2d
from deepshare.plan import Plan, apply_plan
from deepshare.train import load_recipe, networks, task, train
from deepshare.train.loop import evaluate, make_optimizer
from deepshare.train.task import Distillation, HardLabels
from deepshare.train.teacher import Network


def batch_of(images: torch.Tensor, labels: torch.Tensor) -> data.Batch:
    return data.Batch(images, labels, torch.arange(len(labels)))


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits)
    return shares / shares.sum(1, keepdims=True)


def test_distillation_is_the_formula():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    hard = -np.log(softmax(ours)[np.arange(5), labels]).mean()
    student, teacher = softmax(ours / 4), softmax(theirs / 4)
    soft = (teacher * (np.log(teacher) - np.log(student))).sum(1).mean()
    distil = Distillation(Network(Fixed(theirs)), temperature=4, weight=0.3)
    batch = batch_of(torch.zeros(5, 1), torch.from_numpy(labels))
    loss = distil(Fixed(ours), batch)
    assert loss.item() == pytest.approx(0.7 * hard + 0.3 * 16 * soft, rel=1e-12)
    assert HardLabels()(Fixed(ours), batch).item() == pytest.approx(hard)


def entropy_gap(teacher: np.ndarray, student: np.ndarray) -> float:
    return float((teacher * (np.log(teacher) - np.log(student))).sum(1).mean())


def test_decoupled_distillation_is_the_formula_and_its_parts_make_kl():
    """Zhao et al. 2022: KD = TCKD + (1 - p) NCKD per image, p the teacher's share of the label."""
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=(6, 5)) * 3, rng.normal(size=(6, 5)) * 3
    labels = np.array([0, 4, 1, 3, 0, 2])
    rows, tensors = np.arange(6), [torch.from_numpy(logits) for logits in (ours, theirs)]
    student, teacher = softmax(ours), softmax(theirs)
    p, q = teacher[rows, labels], student[rows, labels]
    not_label = np.arange(5) != labels[:, None]
    others = [(share[not_label].reshape(6, 4)) / (1 - share[rows, labels])[:, None] for share in (teacher, student)]
    tckd = entropy_gap(np.stack([p, 1 - p], 1), np.stack([q, 1 - q], 1))
    nckd = entropy_gap(*others)
    hot = torch.from_numpy(labels)
    assert task.target_kl(*tensors, hot).item() == pytest.approx(tckd, rel=1e-12)
    assert task.other_kl(*tensors, hot).item() == pytest.approx(nckd, rel=1e-12)
    assert task.Decoupled(1.5, 6)(*tensors, hot).item() == pytest.approx(1.5 * tckd + 6 * nckd, rel=1e-12)
    for i in range(6):
        one = [logits[i : i + 1] for logits in tensors]
        whole = task.target_kl(*one, hot[i : i + 1]) + (1 - p[i]) * task.other_kl(*one, hot[i : i + 1])
        assert task.kl(*one, hot[i : i + 1]).item() == pytest.approx(whole.item(), rel=1e-12)


def test_decoupled_distillation_stays_finite_where_the_label_has_all_the_share():
    logits = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    loss = task.Decoupled(1, 8)(logits, torch.tensor([[180.0, 2.0, 0.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1].abs() > 0.1  # NCKD still speaks of the other classes


def test_a_recipe_says_how_a_phase_distils(tmp_path):
    changes = ["model.width=2", "data.limit=64", "phase.*.epochs=1", "phase.*.batch_size=32"]
    losses = []
    for more in ([], ["distill.method=dkd"], ["distill.method=dkd", "distill.beta=2"]):
        result = train(load_recipe("demo-relu", [*changes, *more]), tmp_path / str(len(losses)))
        losses.append([row["loss"] for row in result.rows])
    assert len({loss[0] for loss in losses}) == 1  # the teacher learns from labels
    assert len({loss[1] for loss in losses}) == 3


def test_masks_are_learned_by_adam_without_weight_decay():
    phase = load_recipe("demo-snl-960", ["phase.masks.weight_decay=5e-4"]).phase_of("masks")
    model = nn.Sequential(nn.Conv2d(3, 8, 1), LearnedMask((8,)))
    optimizer = make_optimizer(model, phase)
    assert isinstance(optimizer, torch.optim.Adam)
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert decay[id(model[1].mask)] == 0
    assert decay[id(model[0].weight)] == 5e-4


def test_the_lasso_is_added_to_any_task():
    masks = [torch.tensor([0.5, -2.0], requires_grad=True)]
    with_lasso, batch = task.WithLasso(HardLabels(), masks, 0.1), batch_of(torch.zeros(2, 1), torch.tensor([0, 1]))
    loss = with_lasso(Fixed(np.zeros((2, 4))), batch)
    assert loss.item() == pytest.approx(np.log(4) + 0.25)
    loss.backward()
    assert masks[0].grad.tolist() == pytest.approx([0.1, -0.1])
    with_lasso.coefficient.fill_(0.2)
    assert with_lasso(Fixed(np.zeros((2, 4))), batch).item() == pytest.approx(np.log(4) + 0.5)


class Fixed(nn.Module):
    """A network whose logits are given."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.from_numpy(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_the_teacher_neither_learns_nor_normalises_by_the_batch():
    teacher = models.create("resnet18", num_classes=10, width=4, in_channels=1).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = models.create("resnet18", num_classes=10, width=4, in_channels=1)
    batch = batch_of(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    Distillation(Network(teacher), 4, 0.5)(student, batch).backward()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(value.grad is None for value in teacher.parameters())
    assert all(value.grad is not None for value in student.parameters())


@pytest.mark.parametrize("decay_affine", [False, True])
def test_weight_decay_reaches_alpha_and_beta_only_when_asked(decay_affine):
    phase = load_recipe("demo-240", [f"phase.gelu.decay_affine={str(decay_affine).lower()}"]).phase[1]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), SharedReLU2d(8, 2))
    optimizer = make_optimizer(model, phase)
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert len(decay) == 4
    assert decay[id(model[0].weight)] == phase.weight_decay > 0
    assert decay[id(model[1].alpha)] == decay[id(model[1].beta)] == (phase.weight_decay if decay_affine else 0)


def shared_model(width: int = 4) -> tuple[nn.Module, Plan]:
    recipe = load_recipe("demo-240", [f"model.width={width}"])
    spec = networks.model_spec(recipe.model, 10, (1, 8, 8))
    plan = networks.make_plan(recipe, spec)
    return networks.fresh(recipe, spec, plan, "gelu"), plan


def test_switch_turns_the_last_channels_first_everywhere_at_once_and_prototypes_last():
    model, plan = shared_model()
    networks.soften(model)
    gates = list(networks.shared_gates(model))
    assert len(gates) == len(plan) == 16
    before = {gate: gate.channels for gate in gates}
    for epoch in range(10):
        networks.switch(model, epoch, 10)
        for gate in gates:
            soft = gate.soft_channels
            assert soft <= before[gate]
            assert abs(soft / gate.channels - (9 - epoch) / 10) < 1 / gate.channels
            before[gate] = soft
            if soft >= gate.prototypes:  # a replicate is soft still, so every prototype is
                continue
            assert all(channel >= soft for channel in range(gate.prototypes, gate.channels))
    assert networks.soft_channels(model) == 0


def test_a_channel_is_hard_from_its_turn_on_whatever_its_prototype_is():
    gate = SharedReLU2d(6, 2)
    x = torch.randn(3, 6, 2, 2)
    hard = gate(x)
    gate.soft_channels = 6
    soft = gate(x)
    for left in range(6):
        gate.soft_channels = left
        assert torch.equal(gate(x)[:, left:], hard[:, left:])
        assert torch.equal(gate(x)[:, :left], soft[:, :left])


def test_hard_drelus_are_the_gates_that_are_hard():
    model, plan = shared_model()
    for soft_share in (1, 0.75, 0.5, 0.2, 0):
        used: dict[str, set[int]] = {}
        for site in plan:
            gate = model.get_submodule(site.name)
            gate.soft_channels = int(soft_share * gate.channels)
            prototypes = gate.channel_map.pi[gate.soft_channels :].tolist()
            used.setdefault(site.leader or site.name, set()).update(prototypes)
        expected = sum(len(gates) * plan[name].positions for name, gates in used.items())
        assert networks.hard_drelus(model, plan) == expected
    assert expected == plan.drelus


def test_hard_drelus_of_other_networks():
    model = models.create("resnet18", num_classes=10, width=4, in_channels=1)
    plan = Plan.of(model, (1, 8, 8))
    assert networks.hard_drelus(model, plan) == 1920
    assert networks.hard_drelus(apply_plan(model, networks.teacher_plan(plan)), networks.teacher_plan(plan)) == 0


def fresh_state(*changes: str) -> dict[str, torch.Tensor]:
    recipe = load_recipe("demo-240", ["model.width=8", "plan.budget=480", *changes])
    spec = networks.model_spec(recipe.model, 10, (1, 8, 8))
    return networks.fresh(recipe, spec, networks.make_plan(recipe, spec), "gelu").state_dict()


def test_alpha_and_beta_start_at_1_and_0_or_spread_over_both_signs():
    plain, spread = fresh_state(), fresh_state("plan.affine_start=uniform")
    affine = [name for name in plain if name.endswith((".alpha", ".beta"))]
    assert [name for name in plain if not torch.equal(plain[name], spread[name])] == affine
    assert all(torch.equal(plain[name], torch.full_like(plain[name], name.endswith("alpha"))) for name in affine)
    for kind in ("alpha", "beta"):
        values = torch.cat([spread[name] for name in affine if name.endswith(kind)])
        assert values.abs().max() <= 1
        assert torch.histc(values, 4, -1, 1).min() > 0.15 * len(values)
    again, other = fresh_state("plan.affine_start=uniform"), fresh_state("plan.affine_start=uniform", "seed=1")
    assert all(torch.equal(again[name], spread[name]) and not torch.equal(other[name], spread[name]) for name in affine)
    kept = fresh_state("plan.affine_start=uniform", "plan.affine=false")
    assert all(torch.equal(kept[name], plain[name]) for name in plain)


def test_evaluate_is_the_share_of_right_answers():
    digits = data.load("digits")
    logits = torch.eye(10)[digits.test.labels]
    logits[:90] = torch.eye(10)[(digits.test.labels[:90] + 1) % 10]
    answers = iter(logits.split(100))

    class Oracle(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return next(answers)

    assert evaluate(Oracle(), digits.batches("test", 100)) == 0.75
