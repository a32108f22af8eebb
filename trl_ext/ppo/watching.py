"""What the guard's decisions and the evaluations do to a run: beta, the last good policy, the best one, the end."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trl_ext.ppo.guard import FACTOR, FAULTS, SNAPSHOT_EVERY, Limits, PolicyGuard
from trl_ext.ppo.snapshot import Snapshot
from trl_ext.ppo.state import PPOState
from trl_ext.roles import Role

LOGGER = logging.getLogger(__name__)
FOLDER = "guard"
BEFORE = "before"  # with `rollout_lag`: the policy that is making the next batch
WITHIN = 4 / 3  # of kl_target: the KL up to which a policy may be the best one


class WatchCallback(TrainerCallback, ExportableState):
    """Watches the policy, goes back where the guard says so, and keeps the best policy of the evaluations.

    Checkpoints know it by the name of its class.

    Args:
        args: `PPOMaxConfig`.
        ppo_state: The trainer's; beta and the policy's pace are changed there.
        watched: Names of rewards that are measured and not trained on.
        optimizer: Gives the trainer's; its groups are named by "role".
        checkpoint: Gives the folder that training goes on from.
        went_back: Called when the policy was set back to an earlier one.
        whole: Whether this process holds whole weights and states, which can be copied and written back.
    """

    def __init__(
        self,
        args: Any,
        ppo_state: PPOState,
        watched: tuple[str, ...],
        *,
        optimizer: Callable[[], Any],
        checkpoint: Callable[[], str | None],
        went_back: Callable[[], None] = lambda: None,
        whole: bool = True,
    ):
        self.args, self.ppo_state, self.optimizer, self.checkpoint = args, ppo_state, optimizer, checkpoint
        self.went_back = went_back
        held = args.beta > 0 and args.kl_control != "fixed"
        possible = {"raise_beta": args.beta > 0, "step_back": whole, "stop": True}
        acts = [act for act in args.guard_acts if possible[act]]
        limits = Limits(args.kl_target if held else None, watched)
        self.guard = PolicyGuard(acts, limits, _alert(args)) if args.guard else None
        self.snapshots = {"good": Snapshot(), "best": Snapshot()} if whole else {}
        if self.snapshots and args.rollout_lag:
            self.snapshots[BEFORE] = Snapshot()
        self.going_back = False
        self.pace = 1.0  # factor on the size of an update of the policy
        self.stats: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into `trainer_state.json`."""
        taken = [name for name, snapshot in self.snapshots.items() if snapshot.info]
        own = {"snapshots": taken, "pace": self.pace, "stats": self.stats}
        return {"args": {}, "attributes": own | ({"guard": self.guard.state_dict()} if self.guard else {})}

    def observe(self, figures: dict[str, float], step: int) -> dict[str, float]:
        """Look at a rollout batch, before its update.

        Args:
            figures: Its logged metrics and `completion_figures`; those of the last update's steps are added.
            step: Optimizer steps so far.

        Returns:
            The guard's metrics.
        """
        if self.guard is None:
            return {}
        act, metrics = self.guard.observe({**self.stats, **figures}, step)
        if act == "raise_beta":
            self.ppo_state.kl.coef *= FACTOR
        self.going_back |= act == "step_back"
        if self.snapshots:
            self._keep(figures, step)
        return metrics

    def _keep(self, figures: dict[str, float], step: int) -> None:
        """Keep the policy that made a sound batch: the first one, and every third from there.

        A batch that was sampled ahead is of the policy before the last update, which was kept for that.
        """
        due, kl = (self.ppo_state.rollouts - 1) % SNAPSHOT_EVERY == 0, figures.get("kl", 0.0)
        if due and self.guard is not None and self.guard.sound:
            if not figures.get("sampling/lag"):
                self.snapshots["good"].take(self.optimizer(), step=step, kl=kl)
            elif self.snapshots[BEFORE].info:
                self.snapshots["good"], self.snapshots[BEFORE] = self.snapshots[BEFORE], Snapshot()
        if BEFORE in self.snapshots and self.ppo_state.rollouts % SNAPSHOT_EVERY == 0:
            self.snapshots[BEFORE].take(self.optimizer(), step=step, kl=kl)

    def end_update(self, stats: dict[str, float]) -> None:
        """Remember the steps of an update, for the next look."""
        self.stats = dict(stats)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = (state.stateful_callbacks or {}).get(type(self).__name__) if state.global_step > 0 else None
        if saved is None:
            return
        attributes = saved["attributes"]
        if self.guard is not None and "guard" in attributes:
            self.guard.load_state_dict(attributes["guard"])
        self.stats = attributes["stats"]
        self._set_pace(attributes["pace"])
        for name in attributes["snapshots"] if self.snapshots else ():
            self.snapshots[name].load(Path(str(self.checkpoint())) / FOLDER / f"{name}.safetensors")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.at_border(state.global_step, state.max_steps):
            return
        if self.going_back and self.snapshots["good"].info:
            good = self.snapshots["good"]
            good.restore(self.optimizer())
            self.ppo_state.diversity.forget_last()
            self.went_back()
            self._set_pace(self.pace / FACTOR)
            LOGGER.warning("guard, step %d: the policy of step %d is back", state.global_step, int(good.info["step"]))
        self.going_back = False
        if self.guard is not None and self.guard.state.stopped is not None:
            control.should_training_stop = True

    def _set_pace(self, pace: float) -> None:
        self.pace = pace
        if Role.POLICY in self.ppo_state.steps:
            self.ppo_state.steps[Role.POLICY].target = self.args.update_kl_target * pace

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Keep the policy whose mean reward on the evaluation set is the highest so far, its KL within the target's.

        Of two that are equal the earlier stays. An evaluation without a finite reward, or whose KL is above 4/3 of
        `kl_target`, names no best policy; where none did, the run ends with its last policy.
        """
        reward = (metrics or {}).get("eval_reward", math.nan)
        if not args.keep_best_policy or not self.snapshots or not math.isfinite(reward):
            return
        kl, best = (metrics or {}).get("eval_kl", 0.0), self.snapshots["best"]
        if kl <= WITHIN * args.kl_target and reward > best.info.get("reward", -math.inf):
            best.take(self.optimizer(), step=state.global_step, reward=reward, kl=kl)

    def save(self, checkpoint: Path) -> None:
        """Write the policies that were kept into a checkpoint, of which this is no last file: its state ends it."""
        for name, snapshot in self.snapshots.items():
            if self.args.should_save and snapshot.info:
                (checkpoint / FOLDER).mkdir(parents=True, exist_ok=True)
                snapshot.save(checkpoint / FOLDER / f"{name}.safetensors")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run ends with its best policy; one that was stopped, with that or with its last good one."""
        stopped = self.guard is not None and self.guard.state.stopped is not None
        for name in ("best", "good") if stopped else ("best",):
            snapshot = self.snapshots.get(name)
            if snapshot is not None and snapshot.info:
                if snapshot.info["step"] != state.global_step or stopped:
                    snapshot.restore(self.optimizer(), with_states=False)
                    LOGGER.warning("the %s policy, of step %d, is the result", name, int(snapshot.info["step"]))
                return

    def outcome(self) -> dict[str, Any]:
        """What a report says of it: every alarm, why the run was stopped, and the steps of the policies it kept."""
        guard = self.guard.state if self.guard is not None else None
        return {
            "alarms": [alarm | {"means": FAULTS[alarm["alarm"]].means} for alarm in guard.raised] if guard else [],
            "stopped": guard.stopped if guard is not None else None,
            **{f"{name}_policy": dict(snapshot.info) for name, snapshot in self._kept().items()},
        }

    def _kept(self) -> dict[str, Snapshot]:
        return {name: s for name, s in self.snapshots.items() if s.info and name != BEFORE}

    def stopped(self) -> str | None:
        """Why the guard stopped the run, in words for its user; None where it did not."""
        if self.guard is None or self.guard.state.stopped is None:
            return None
        kept = [f"the {name} policy, of step {int(s.info['step'])}," for name, s in self._kept().items()]
        return (
            f"the guard stopped the run: {self.guard.state.stopped}. In {self.args.output_dir} lies "
            f"{kept[-1] if kept else 'the last policy,'} with its critic. The documentation (tuning) says what each "
            "alarm means; guard_acts=[] lets a run go on whatever is seen."
        )


def _alert(args: Any) -> Callable[[str, str], None]:
    """Alerts of trackio, where it tracks the run; its dashboard shows them."""
    if "trackio" not in args.report_to or args.process_index != 0:
        return lambda title, text: None
    import trackio

    return lambda title, text: trackio.alert(title=title, text=text, level=trackio.AlertLevel.WARN)
