"""``transformers.Trainer`` around ``train_step``: what the loss, its batches and exact resuming need beyond it."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from engine.errors import EngineError, TrainingDiverged
from engine.jacobi import Vocabulary
from engine.job.interrupt import Interrupted
from engine.training.checkpoint import checkpoints, published, remove_old
from engine.training.collator import TrajectoryCollator
from engine.training.config import TrainConfig
from engine.training.data import BatchCollator, EpochBatches, Trajectories, padded_shares
from engine.training.samples import refine_samples, write_samples
from engine.training.sharded import (
    gathered_weights,
    load_scheduler,
    load_sharded_optimizer,
    save_scheduler,
    save_sharded_optimizer,
)
from engine.training.step import TrainStepOutput, train_step
from engine.training.watch import Watch

_WATCH = "watch.json"
"""Beside the trainer's own files in a checkpoint: the losses that the next steps are judged by."""


class RefinerTrainer(Trainer):
    """Trains on trajectories. ``model`` is a causal LM, with LoRA or sharded by ``fully_shard`` if the config says so."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        config: TrainConfig,
        *,
        train: Trajectories,
        evaluation: Trajectories | None,
        vocabulary: Vocabulary,
        tokenizer: PreTrainedTokenizerBase,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``check`` raises Interrupted once training should end; the step it comes in is finished and saved."""
        self.config, self.vocabulary, self.tokenizer, self._check = config, vocabulary, tokenizer, check
        self.interrupted: Interrupted | None = None
        """What asked this process to end."""
        self.stopped = False
        """Whether any process was asked to."""
        self._micro: list[tuple[Tensor, Tensor, Tensor]] = []
        self._terms: list[tuple[float, float]] = []
        self._watch = Watch(config.omega, config.explosion)
        self.collator = self._collator(config.drafts if config.omega else 0)
        if config.fsdp:
            model._is_accelerate_prepared = True  # type: ignore[assignment]  # or it would be wrapped in DDP as well
        super().__init__(
            model=model, args=args, train_dataset=train, eval_dataset=evaluation, data_collator=BatchCollator(self.collator),
            callbacks=[_Flow(self)],
        )  # fmt: skip
        self.batches = EpochBatches(
            len(train), config.batch_size, args.per_device_train_batch_size,
            seed=config.seed, process=args.process_index, processes=args.world_size,
        )  # fmt: skip
        # the loss of a micro-batch is its part of the whole step's: transformers (two names, by version) divides no more
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _collator(self, drafts: int) -> TrajectoryCollator:
        config = self.config
        return TrajectoryCollator(
            self.vocabulary.pad, drafts=drafts, window=config.window, max_tokens=config.max_tokens, seed=config.seed
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process; accelerate would share them out once more."""
        assert self.train_dataset is not None
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
        )

    def set_epoch(self, epoch: int) -> None:
        """Makes order and drafts those of another pass over the data."""
        self.batches.set_epoch(epoch)
        self.collator.set_epoch(epoch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of one step, and how many labels and pairs there are in those of all processes, [2]."""
        if self.state.global_step >= self.state.max_steps:
            # resumed behind the last step, in the middle of an epoch: the trainer would take one more before it stops
            self.control.should_training_stop = True
            num_batches = 0
        samples = list(itertools.islice(epoch_iterator, num_batches))
        labels = sum(int(sample["batch"]["label_count"]) for sample in samples)
        pairs = sum(int(sample["batch"]["pair_count"]) for sample in samples)
        counts = self.accelerator.reduce(torch.tensor([labels, pairs], device=device), reduction="sum")
        self._micro.clear()
        return samples, counts.clamp_min(1)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's part of the step's loss; averaging gradients over processes then gives that of the whole."""
        labels, pairs = num_items_in_batch / self.args.world_size
        out = self._loss(model, inputs, self.config.omega, labels, pairs)
        self._micro.append((inputs["rows"], out.ar, out.consistency))
        return (out.loss, out) if return_outputs else out.loss

    def _loss(self, model: nn.Module, inputs: Any, omega: float, labels: Any, pairs: Any) -> TrainStepOutput:
        with self.accelerator.autocast():  # accelerate wraps it around the model's own forward, which does not run
            return train_step(
                model, inputs["batch"], omega=omega, kl_normalization=self.config.kl_normalization,
                ar_denominator=labels, consistency_denominator=pairs, loss_impl=self.config.loss_impl,
            )  # fmt: skip

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Between the backward passes and the optimiser's step: what is not finite must not reach the weights."""
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        try:
            self._check()
        except Interrupted as error:
            self.interrupted = error
        terms = torch.stack([torch.stack([ar, consistency]) for _, ar, consistency in self._micro]).sum(0)
        terms = torch.cat([terms, terms.new_tensor([self.interrupted is not None])])
        ar, consistency, stop = self.accelerator.reduce(terms, reduction="mean").tolist()
        self.stopped = stop > 0  # the processes end together
        if problem := self._watch.problem(ar, consistency, float(norm)):
            raise TrainingDiverged(self._diagnosis(problem, ar, consistency, float(norm)))
        self._terms.append((ar, consistency))
        return norm

    def _diagnosis(self, problem: str, ar: float, consistency: float, norm: float) -> str:
        bad = [rows for rows, *terms in self._micro if not all(bool(torch.isfinite(term)) for term in terms)]
        rows = torch.cat(bad or [rows for rows, *_ in self._micro]).tolist()
        ids = ", ".join(repr(self.train_dataset[row][1].id) for row in rows)  # type: ignore[index]
        saved = checkpoints(Path(str(self.args.output_dir)))
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return (
            f"step {self.state.global_step + 1} of {self.state.max_steps} was not taken: {problem} (ar {ar:.4g}, "
            f"consistency {consistency:.4g}, omega {self.config.omega:g}, gradient norm {norm:.4g}, "
            f"lr {self._get_learning_rate():.3g}); trajectories in it: {ids}; {last}: look at these rows, or start anew "
            "with a lower lr or omega"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss's two terms, means over the steps since the last log as the loss is."""
        if "loss" in logs and self._terms:
            logs["ar"], logs["consistency"] = (statistics.fmean(term) for term in zip(*self._terms, strict=True))
            self._terms.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Both terms over all evaluation trajectories, with the same drafts each time, and some drafts refined."""
        dataset: Trajectories = self.eval_dataset if eval_dataset is None else eval_dataset  # type: ignore[assignment]
        start = time.monotonic()
        collate = BatchCollator(self._collator(self.config.drafts))
        self.model_wrapped.eval()
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        args = self.args
        for places, counts in padded_shares(
            len(dataset), args.per_device_train_batch_size, process=args.process_index, processes=args.world_size
        ):
            inputs = self._prepare_inputs(collate([dataset[place] for place in places]))
            with torch.no_grad():
                out = self._loss(self.model_wrapped, inputs, 1.0, 1.0, 1.0)
            totals += counts * torch.stack([out.ar, out.consistency, out.label_count, out.pair_count]).double()
        ar, consistency, labels, pairs = self.accelerator.reduce(totals, reduction="sum").tolist()
        ar, consistency = ar / max(labels, 1), consistency / max(pairs, 1)
        metrics = {"loss": ar + self.config.omega * consistency, "ar": ar, "consistency": consistency}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._write_samples(dataset)
        self.log({**metrics, f"{metric_key_prefix}_runtime": round(time.monotonic() - start, 4)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _write_samples(self, dataset: Trajectories) -> None:
        chosen = dataset.trajectories[: self.config.samples]
        if not chosen:
            return
        with self.accelerator.autocast():
            refined = refine_samples(self.model_wrapped, chosen, self.vocabulary, window=self.config.window)
        if self.args.should_save:
            path = Path(str(self.args.output_dir), "samples.jsonl")
            write_samples(path, refined, self.tokenizer, step=self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All that going on takes, in a folder that has its name only once it is whole."""
        output, writes = Path(str(self.args.output_dir)), self.args.should_save
        self.store_flos()
        folder = output / f"checkpoint-{self.state.global_step}"
        with published(folder, writes=writes, wait=self.accelerator.wait_for_everyone) as partial:
            self.save_model(str(partial), _internal_call=True)
            self._save_optimizer_and_scheduler(str(partial))
            self._save_rng_state(str(partial))
            if writes:
                self.tokenizer.save_pretrained(str(partial))
                self.state.save_to_json(str(partial / "trainer_state.json"))
                (partial / _WATCH).write_text(json.dumps(self._watch.history))
        if writes:
            remove_old(output, self.config.keep_checkpoints)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights and config as ``from_pretrained`` reads them; called by all processes."""
        state = self._gathered()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def save_refiner(self, folder: Path) -> None:
        """The trained model, adapters merged, and its tokenizer, as ``Refiner.from_pretrained`` reads them.

        Merges the adapters of this trainer's model, and rounds its weights to ``save_dtype``: nothing is trained after it.
        """
        with published(folder, writes=self.args.should_save, wait=self.accelerator.wait_for_everyone) as partial:
            model: Any = self.model
            model = model.merge_and_unload() if self.config.lora_rank else model
            if self.config.save_dtype is not None:
                model.to(getattr(torch, self.config.save_dtype))
            state = self._gathered()
            if self.args.should_save:
                self._check_rounded(model.state_dict() if state is None else state)
                model.config.use_cache = True  # the trainer has switched it off
                model.save_pretrained(partial, state_dict=state)
                self.tokenizer.save_pretrained(str(partial))

    def _check_rounded(self, state: dict[str, Tensor]) -> None:
        """Raises EngineError: float16 ends at 65504, and a weight beyond it would be infinite without a word."""
        lost = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if lost and self.config.save_dtype == "float16":
            raise EngineError(
                f"save_dtype=float16 cannot hold the weights of {lost[0]}: it ends at 65504; the same command with "
                "save_dtype=bfloat16 goes on from the last checkpoint"
            )

    def _gathered(self) -> dict[str, Any] | None:
        """On the first process the weights of a sharded model, of which every process has a part; None if it is whole."""
        return gathered_weights(self.model) if self.config.fsdp else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.config.fsdp:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded_optimizer(Path(output_dir), self.model, self.optimizer)
        if self.args.should_save:
            save_scheduler(Path(output_dir), self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and (history := Path(checkpoint, _WATCH)).exists():  # those of earlier versions have none
            self._watch.history = json.loads(history.read_text())
        if not self.config.fsdp or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_sharded_optimizer(Path(checkpoint), self.model, self.optimizer)
        load_scheduler(Path(checkpoint), self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Only adapters: a model that is trained in full is loaded from the checkpoint's folder in the first place."""
        if self.config.lora_rank:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Flow(TrainerCallback):
    """When things happen, where transformers' own rules would leave gaps."""

    def __init__(self, trainer: RefinerTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.trainer.set_epoch(int(state.epoch or 0))
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.trainer.stopped:
            control.should_save = control.should_training_stop = True
        if (
            state.global_step >= state.max_steps
        ):  # whether interrupted or not: going on would take no step to evaluate after
            control.should_evaluate = self.trainer.eval_dataset is not None
        # the mean of a log line must not reach over a checkpoint: what is behind it would be missing after a resume
        control.should_log = control.should_log or control.should_save
        return control
