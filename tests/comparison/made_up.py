"""A made-up comparison, small or as large as a real one, for the tests of what reads comparisons."""

import itertools

import numpy as np

from muonrec.comparison.results import Arm, Comparison, Design, RunResult, Spectrum

RATES = {
    "dense": ("dense_optimizer.lr",),
    "rest": ("adamw.lr",),
    "tables": ("tables.item.lr",),
}
GRIDS = {"dense": (3e-4, 1e-3, 3e-3, 1e-2), "rest": (3e-4, 1e-3, 3e-3), "tables": (0.1, 0.2, 0.4, 0.8)}


def made_up_design(*, budgets=(1.0, 0.5), seeds=(1, 2, 3), trials=6) -> Design:
    arms = (
        Arm(
            "one-rate",
            {"dense_optimizer": "adamw", "tables.*.optimizer": "partial_rowwise_adam"},
            ("dense_optimizer", "tables.*.optimizer"),
            ("tables.item.optimizer",),
            {"lr": (3e-4, 1e-3, 3e-3, 1e-2)},
            {"lr": ("dense_optimizer.lr", "adamw.lr", "tables.item.lr")},
        ),
        Arm("control", {"dense_optimizer": "adamw"}, ("dense_optimizer",), (), GRIDS, RATES),
        Arm("muon", {"dense_optimizer": "muon"}, ("dense_optimizer",), (), GRIDS, RATES),
    )
    return Design("made-up", arms, "control", trials=trials, seeds=tuple(seeds), budgets=tuple(budgets))


def made_up_comparison(*, lift=0.05, num_users=400, evaluations=50, num_items=1000, **design) -> Comparison:
    """Three arms; ``muon`` ranks and learns ``lift`` better than the control, ``one-rate`` 0.2 worse."""
    design = made_up_design(**design)
    generator = np.random.default_rng(0)
    counts = np.maximum(1, generator.pareto(1.0, num_users) * 4).astype(np.int64)
    targets = {
        "user_id": np.arange(num_users),
        "target": generator.integers(0, num_items, num_users),
        "history_length": generator.geometric(0.12, num_users) + 2,
        "target_train_count": counts,
    }
    lifts = {"one-rate": -0.2, "control": 0.0, "muon": lift}
    runs = []
    for arm in design.arms:
        grid = [dict(zip(arm.grids, values, strict=True)) for values in itertools.product(*arm.grids.values())]
        for budget in design.budgets:
            trials = []
            for trial, place in enumerate(generator.permutation(len(grid))[: design.trials]):
                loss = sum(abs(np.log(value / np.median(arm.grids[name]))) for name, value in grid[place].items())
                lift = lifts[arm.name] - 0.03 * loss
                trials.append(_run(arm.name, "tune", budget, 0, trial, grid[place], lift, evaluations))
            runs += trials
            rates = max(trials, key=lambda run: run.valid["ndcg@10"]).rates
            for seed in design.seeds:
                known = lifts[arm.name] - 0.1 * (1 - budget)
                # One draw per user and seed, so that arms are paired as real ones are.
                noise = np.random.default_rng(seed).gumbel(0, 0.35, num_users)
                own = generator.gumbel(0, 0.1, num_users)
                difficulty = np.random.default_rng(99).normal(4.5, 1.8, num_users) - 0.25 * np.log(counts)
                greater = np.exp(difficulty - 3 * known + noise + own).astype(np.int64)
                ranks = np.minimum(greater, num_items - 1).astype(np.int32)
                runs.append(_run(arm.name, "final", budget, seed, None, rates, known, evaluations, ranks))
    return Comparison(design, tuple(runs), targets)


def _run(arm, stage, budget, seed, trial, rates, lift, evaluations, ranks=None) -> RunResult:
    generator = np.random.default_rng([seed, len(arm), int(100 * budget), trial or 0])
    num_steps = round(2000 * budget)
    steps = np.linspace(num_steps / evaluations, num_steps, evaluations).round().astype(int)
    speed = 500 * budget * (1 - 2 * lift)
    height = 0.05 * (1 + lift) * (0.8 + 0.2 * budget)
    values = height * (1 - np.exp(-steps / speed)) + generator.normal(0, 0.0003, evaluations)
    best = int(np.argmax(values))
    per_step_s = 0.06 if arm == "muon" else 0.05
    done = RunResult(
        run=f"{arm}-{stage}-{budget:g}-{seed}-{trial}-{lift:g}",
        arm=arm,
        stage=stage,
        budget=budget,
        seed=seed,
        trial=trial,
        rates=rates,
        config_hash="c" * 12,
        sources_hash="s" * 12,
        valid={"ndcg@10": float(values[best]), "recall@10": float(1.8 * values[best])},
        curve_step=tuple(int(step) for step in steps),
        curve_seconds=tuple(float(step * per_step_s) for step in steps),
        curve_value=tuple(float(value) for value in values),
        num_steps=num_steps,
        best_step=int(steps[best]),
        seconds=num_steps * per_step_s,
        wall_s=num_steps * per_step_s + 60,
        events_per_s=1800 / per_step_s,
        optimizer_share=0.18 if arm == "muon" else 0.03,
        peak_memory_bytes=800 << 20,
        device="cpu",
        fingerprints={"initial_state": f"i{seed}", "first_batches": f"b{seed}", "epoch_order": f"o{seed}"},
        num_greater=ranks,
        num_equal=None if ranks is None else np.zeros_like(ranks),
        spectra=tuple(_spectra(arm, steps, generator)) if stage == "final" else (),
    )
    if ranks is None:
        return done
    test = {metric: float(done.per_target(metric).mean()) for metric in ("ndcg@10", "recall@10", "mrr")}
    return RunResult(**{**vars(done), "test": test})


def _spectra(arm, steps, generator):
    for step in steps[:: max(1, len(steps) // 4)]:
        for name in ("tower.blocks.0.attention.query.weight", "tower.blocks.0.feedforward.1.weight"):
            for what in ("weight", "update"):
                decay = 0.02 if (arm, what) == ("muon", "update") else 0.2
                values = np.exp(-decay * np.arange(8)) * generator.uniform(0.9, 1.1)
                stable_rank = float((values**2).sum() / values[0] ** 2)
                yield Spectrum(int(step), name, what, stable_rank, tuple(float(v) for v in values))
