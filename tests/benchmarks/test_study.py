"""The study: its page is current, its prompts say what they are judged for, and its choices follow from its records."""

import json
from pathlib import Path

import pytest
import torch

import engine
from benchmarks import study_page
from benchmarks.tinyworld import study
from benchmarks.tinyworld.bench import study_prompts
from benchmarks.tinyworld.concepts import CONCEPTS
from benchmarks.tinyworld.look_judge import Look, overlap
from benchmarks.tinyworld.study import METHODS, chosen_rates, tuning_tasks
from engine.train.loop import run


def test_the_page_is_current() -> None:
    results = [study_page.newest(kind) for kind in ("study", "layout", "sweeps")]
    assert study_page.PAGE.read_text() == study_page.page(*results), "run python -m benchmarks.study_page"


def test_prompts_have_a_place_for_the_concept() -> None:
    prompts = study_prompts("cat")
    assert len({prompt.text for prompt in prompts}) == 12
    assert prompts[0].text.format("V* cat") == "a photo of a V* cat on a beach"
    assert [prompt.text for prompt in prompts if prompt.kind == "two"] == ["a photo of a {} and a boat on a beach"]
    assert all(prompt.text.count("{}") == 1 for prompt in prompts)


def test_rates_are_those_with_the_best_product() -> None:
    def record(method: str, rate: float, likeness: float, context: float) -> dict:
        means = {"likeness": likeness, "object": 1.0, "context": context}
        return {"trained_as": method, "learning_rate": rate, **{name: {"mean": mean} for name, mean in means.items()}}

    tuning = [record("ico", 1.0, 0.9, 0.1), record("ico", 2.0, 0.5, 0.5), record("lora", 3.0, 0.2, 0.2)]
    assert chosen_rates(tuning) == {"ico": 2.0, "dci": 2.0, "lora": 3.0}
    assert {task.method for task in tuning_tasks(["dci", "dreambooth:prior"], "small")} == {"ico", "dreambooth"}


def test_a_look_is_a_concepts_where_all_three_are() -> None:
    one = CONCEPTS["striped-cat"]
    own, plain = (one.colour, one.pattern, one.pattern_colour), (one.colour, "", "")
    chances = {"cat": ({one.colour: 0.9}, {one.pattern: 0.6}, {one.pattern_colour: 0.3})}
    looks = {"cat": own, "dog": plain}
    assert Look("cat", looks, chances, torch.zeros(1)).shows("striped-cat")
    assert not Look("cat", {"cat": plain}, chances, torch.zeros(1)).shows("striped-cat")
    assert Look("cat", looks, chances, torch.zeros(1)).likeness("striped-cat") == pytest.approx(0.6)
    half = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert overlap(half, torch.ones(2, 2)) == pytest.approx(0.5)
    assert overlap(half, half) == 1


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_learns_draws_and_leaves_the_base_alone(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from benchmarks.tinyworld.concepts import reference_pictures

    sd, method = engine.load(), METHODS[name]
    before = {key: weight.clone() for key, weight in sd.unet.state_dict().items()}
    losses = list[float]()
    own = {"context_learning_rate": 1e-3} if "scheme" in method.extra else {}
    options = method.options(
        steps=2, batch_size=1, progress=False, learning_rate=1e-3, callback=lambda _s, _n, loss: losses.append(loss),
        **own, **method.extra,
    )  # fmt: skip
    prior = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) if method.prior else None
    objective = method.make(sd, reference_pictures("striped-cat"), "cat", options, prior)
    run(objective, options)
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
    assert all(torch.equal(weight, before[key]) for key, weight in sd.unet.state_dict().items())
    plain = sd.generate("a photo of a cat", seed=0, steps=2, output="latent", progress=False).images
    drawers = objective.drawers(tmp_path / "model", 2)
    for drawer in drawers.values():
        drawn = drawer.sd.generate(
            f"a photo of a {drawer.phrase}", seed=0, steps=2, customization=drawer.customization, output="latent",
            progress=False,
        )  # fmt: skip
        assert not torch.allclose(drawn.images, plain, atol=1e-3)
        assert drawer.n_bytes > 0
    assert set(drawers) == {"infusion": {"parallel", "shared"}, "custom_diffusion": {"", "dci"}}.get(method.name, {""})


def test_a_study_goes_on_from_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[study.Task]()

    def run_all(tasks: list[study.Task], _folder: Path, _jobs: int) -> list[dict]:
        asked.extend(tasks)
        return [{"trained_as": task.method, "concept_name": task.concept, "steps": 0} for task in tasks]

    monkeypatch.setattr(study, "run_all", run_all)
    for judge in study.JUDGES:
        monkeypatch.setitem(study.JUDGES, judge, lambda _folder: Look)
    monkeypatch.setattr(Look, "accuracy", {}, raising=False)
    before, out = study_page.newest(), tmp_path / "study.json"
    asking = ["--concepts", "spotted-dog", "--methods", "ico", "--add-to", str(before), "--result", str(out)]
    study.main(asking)
    assert {task.judge for task in asked} == {"whole"}
    with pytest.raises(ValueError, match="'whole', got 'small'"):
        study.main([*asking, "--judge", "small"])
    earlier, made = json.loads(before.read_text()), json.loads(out.read_text())
    assert [(task.method, task.concept) for task in asked] == [("base", "spotted-dog"), ("ico", "spotted-dog")]
    assert asked[1].rate == earlier["settings"]["rates"]["ico"]
    assert made["study"][:-2] == earlier["study"]
    assert made["tuning"] == earlier["tuning"]
    commits, told = made["settings"]["commits"], earlier["settings"]["commits"]
    assert commits == told | {"spotted-dog": made["machine"]["commit"]}
    assert made["settings"]["wall_seconds"] >= earlier["settings"]["wall_seconds"]
    text = study_page.page(before, *(study_page.newest(kind) for kind in ("layout", "sweeps")))
    others = [
        f"{concept} at {commit[:9]}" for concept, commit in told.items() if commit != earlier["machine"]["commit"]
    ]
    assert all(other in text for other in others)
