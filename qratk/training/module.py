"""The LightningModule: a mixed-precision backbone with one adapter a layer, trained on answers and scored as stored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import AttributeDict
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from qratk.adapters.base import AfterStep, Way
from qratk.adapters.options import StoredType
from qratk.backbone.backbone import Backbone
from qratk.backbone.loading import dtype_name, resolve_dtype
from qratk.backbone.logits import (
    model_inputs,
    shared_length,
    training_losses,
)
from qratk.core.batching import BATCH_COST
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.intact import require_intact_archive
from qratk.core.secrets import without_secrets
from qratk.core.shared import SharedLadder
from qratk.data.attached import Attached
from qratk.training.accumulation import TokenWeighting
from qratk.training.allocation import keep_freed_memory
from qratk.training.building import built_adapter, built_backbone, built_tokenizer, context_length
from qratk.training.continuation import Continuation
from qratk.training.failure import NonFiniteLossError, not_finite
from qratk.training.fit_checkpoint import FitCheckpoint
from qratk.training.observing import observe
from qratk.training.optimisation import adamw, moments_of, step_schedule
from qratk.training.options import FineTuneOptions, Schedule
from qratk.training.precision import require_precision
from qratk.training.preparation import asked_configuration, prepare_fit
from qratk.training.scored import ScoredModule
from qratk.training.sharding import ShardedStrategy, require_strategy, shard
from qratk.training.state import TrainingState, device_random_state

_logger = logging.getLogger(__name__)


class FineTuneModule(ScoredModule):
    """Fine-tunes the adapters of one configuration over frozen quantised weights.

    Args:
        model: Hugging Face name or local directory of a causal language model; "embedded" is the one shipped here.
        configuration: bits and ranks as text, `4:8` for all layers or `4:8*3 2:16` layer by layer; a search sets it.
            Options such as the learning rate may follow, as in `4:8 | learning_rate=0.001`, in the place of these here.
        quantizers: quantiser of each bit-width, by registered name or as {class_path, init_args}; or the name of a set:
            "default", "portable" (codes that servers take as they are), "portable_gptq" (these, calibrated).
        granularity: what shares one choice: a transformer block, attention and MLP apart ("sublayer"), what servers
            multiply by at once ("fused": q, k and v; gate and up; all experts of a mixture), or each projection.
        target_modules: "all" linear projections of the blocks, or the last parts of their names.
        adapter: method of adapters, by registered name or as {class_path, init_args}: "lora", or "adalora", which
            prunes singular directions in training until as many are left as the ranks sum to, wherever they matter
            most, or "cut", which trains at one rank and cuts to the configured ones; `qratk components adapters` lists
            all.
        adalora: options of the latter by name.
        alpha_over_rank: LoRA's scaling; constant, so that rank alone differs between layers.
        rslora: scale by alpha / sqrt(rank) instead.
        lora_dropout: dropout before the adapters.
        adapter_dtype: type that adapters are stored, counted and scored in; they are trained in float32. "int8" takes
            half of the bytes: codes with a scale for each direction. PEFT files hold their values in bfloat16.
        init: how adapters begin: "default" (no change of the output), "loftq", "lq_lora" or "cloq" (they make up for
            the quantisation error, by its largest singular values, plain, weighted with Fisher information, or in the
            metric of the inputs' second moment).
        init_iterations: of quantising and approximating in turn; more than 1 packs the weights anew for each rank.
        init_batches, init_batch_size: training batches for the Fisher information of "lq_lora".
        input_groups: size of the groups of inputs that are summed before an adapter (QA-LoRA); null is none.
        learning_rate, weight_decay, betas: of AdamW.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: what follows the warm-up, down to 0 at `schedule_steps`.
        schedule_steps: optimiser steps of the whole schedule; by default the trainer's total, in a search T_S.
        compute_dtype: type of activations and products; adapters are trained in float32 all the same. "auto" is
            bfloat16 on CUDA, and for a checkpoint in bfloat16 on a CPU with instructions for it; float32 otherwise. A
            search records it and goes on with it, wherever it is resumed.
        dense_cache: keep dequantised weights in memory, "off", "on" or "auto" (while there is room): faster, the same
            results.
        bank_dir: folder that keeps packed weights for later runs; "auto" is $QRATK_CACHE or else qratk/banks in the
            user's cache folder, null keeps them in memory only. The same results.
        gradient_checkpointing: trade time for activation memory.
        trust_remote_code: run code that comes with the model; only for sources you trust.
        tokenizer: name or directory of the tokenizer, by default the model's.
        calibration_sequences: training sequences that quantisers such as GPTQ, and the start "cloq", are fitted to.
        seed: seed of adapter initialisation and dropout.
        replicate: number of a training with fresh seeds, as a search has them that confirms its answer: of the order of
            the training rows, adapters and dropout, not of splits. null and 0 mean `seed` itself. Of a fit alone.
    """

    def __init__(
        self,
        model: str,
        configuration: str | None = None,
        quantizers: dict[int, Any] | str | None = None,
        granularity: Literal["block", "sublayer", "fused", "linear"] = "block",
        target_modules: str | list[str] = "all",
        adapter: str | dict[str, Any] = "lora",
        adalora: dict[str, Any] | None = None,
        alpha_over_rank: float = 2.0,
        rslora: bool = False,
        lora_dropout: float = 0.0,
        adapter_dtype: StoredType = "bfloat16",
        init: str = "default",
        init_iterations: int = 1,
        init_batches: int = 8,
        init_batch_size: int = 8,
        input_groups: int | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        schedule: Schedule = "cosine",
        schedule_steps: int | None = None,
        compute_dtype: str = "auto",
        dense_cache: bool | Literal["off", "on", "auto"] = "auto",
        bank_dir: str | None = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        calibration_sequences: int = 128,
        seed: int = 0,
        replicate: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.options = FineTuneOptions.of(self.hparams)
        built_adapter(self.options.adapter, {"adalora": self.options.adalora})  # what cannot be is said at once
        self.strict_loading = False  # checkpoints hold adapters only
        self.configuration: Configuration | None = None
        self.continuation = Continuation()
        self.schedule_steps = schedule_steps
        self._backbone: Backbone | None = None
        self._shared_length: int | None = None
        self._after: AfterStep | None = None

    @property
    def hparams_initial(self) -> AttributeDict:
        """The arguments as loggers write them: without secrets."""
        return AttributeDict(without_secrets(super().hparams_initial))

    # The backbone

    @property
    def backbone(self) -> Backbone:
        """The backbone; loaded when first asked for."""
        if self._backbone is None:
            self._backbone = self.load_backbone()
            if not torch.cuda.is_available():
                keep_freed_memory()
            self._backbone.dense_cache(self.options.dense_cache)
            if self.options.gradient_checkpointing:
                self._backbone.enable_gradient_checkpointing()
            self.model = self._backbone.model  # registers the parameters
            self.model.train(self.training)
        return self._backbone

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.backbone.tokenizer

    @property
    def context_length(self) -> int | None:
        """Tokens that the model can see; None when its configuration does not say."""
        return context_length(self.backbone.config)

    def load_backbone(self, *, weights: bool = True) -> Backbone:
        """A new backbone with these options; without weights it lies on the meta device."""
        return built_backbone(self.options, weights=weights)

    def load_tokenizer(self) -> Attached:
        """What data need of the model: its tokenizer and the tokens that it can see, without the model."""
        return built_tokenizer(self.options)

    def activate(self, configuration: Configuration) -> None:
        """Switch to a configuration, with fresh adapters."""
        self.backbone.activate(configuration, seed=self.options.training_seed)
        self.configuration, self._after = configuration, None

    @property
    def active_options(self) -> FineTuneOptions:
        """The options, with shared settings of the active configuration in the place of their own."""
        return self.options.with_shared(() if self.configuration is None else self.configuration.shared)

    def require_shared(self, ladders: Sequence[SharedLadder]) -> None:
        """Raise `ConfigurationError` for shared settings that this module cannot have, each told by its name."""
        method = built_adapter(self.options.adapter, {"adalora": self.options.adalora})
        for ladder in ladders:
            if ladder.name == "init" and self.options.init_iterations > 1:
                raise ConfigurationError(
                    "search.shared.init: weights are packed anew for each start with init_iterations="
                    f"{self.options.init_iterations}; give init_iterations=1, or one init for all as model.init"
                )
            for value in ladder.values:
                try:
                    method.check(self.options.with_shared(((ladder.name, value),)).adapters)
                except ConfigurationError as error:
                    raise ConfigurationError(f"search.shared.{ladder.name}: {error}") from error

    def setup(self, stage: str) -> None:
        """Load the backbone and switch to the configuration of the options, unless a search has set one."""
        if self._trainer is not None:
            require_precision(self._trainer)
            require_strategy(self._trainer.strategy)
        if stage == "fit":
            self.train()  # Hugging Face models are loaded in eval mode, and Lightning leaves modes alone
            if self.options.replicate:
                self.task_data.replicate = self.options.replicate
        if self.configuration is not None:
            return
        asked = asked_configuration(self.options)
        device = None if self._trainer is None else self._trainer.strategy.root_device
        configuration = prepare_fit(self.backbone, self.options, asked, device=device, data=lambda: self.task_data)
        self.activate(configuration)
        self.backbone.keep_active()
        for note in self.backbone.notes if self.global_rank == 0 else ():
            self.backbone.say(note)

    def configure_model(self) -> None:
        """Shard the adapters where the strategy asks for it."""
        if self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy):
            self._require("sharded", "leave --trainer.strategy out, or give ddp")
            if self.options.adapter_dtype == "int8":
                raise ConfigurationError(
                    "adapters in 8 bits have a scale for each whole direction, and shards hold parts: leave "
                    "--trainer.strategy out, or give ddp or adapter_dtype=bfloat16"
                )
            shard(self.backbone, self.trainer.strategy)

    # Training

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits, (B, T, vocabulary)."""
        inputs = model_inputs(batch, self.backbone.compute_dtype)
        logits: Tensor = self.backbone.model(**inputs, use_cache=False).logits
        return logits

    def training_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood of the labelled tokens of a batch, in nats."""
        return training_losses(self.backbone.model, batch, overhead=self.pass_cost)[0]

    @property
    def pass_cost(self) -> float | None:
        """Tokens that a pass through the model counts as, where a batch may be cut by length; None where it may not."""
        # Processes that shard the model must do the same passes at the same time.
        several = self._trainer is not None and self._trainer.world_size > 1
        return None if several else BATCH_COST

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss; raises `NonFiniteLossError`."""
        loss = self.training_loss(batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(not_finite(float(loss.item()), self.first_step + self.global_step))
        self.log("train/loss", loss, prog_bar=True)
        penalty = self.backbone.adapters.penalty()
        return self._weighting.weighted(loss if penalty is None else loss + penalty, batch["labels"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Bring the gradients to means over the tokens of the step."""
        self._weighting.finish(parameter for _, parameter in self.backbone.trainable_parameters())

    @property
    def first_step(self) -> int:
        """Optimiser steps that were done before this trainer began."""
        return self.continuation.steps

    def on_train_start(self) -> None:
        """Set the random state: of dropout, the only draw in training."""
        self._weighting = TokenWeighting(self.trainer)
        torch.manual_seed(self.options.training_seed)  # of every device
        self.continuation.restore_random(self.device)
        self.continuation = self.continuation.begun

    def on_train_end(self) -> None:
        """Take what decides how adapters are stored; gather sharded ones, so that one process alone can save them."""
        self.observe()
        self.backbone.adapters.gather()

    def observe(self) -> None:
        """Take from training batches what decides how the adapters, as they are at this step, are stored."""
        if count := self.backbone.adapters.method.observed_batches:
            observe(self.backbone.adapters, self.backbone.model, self.task_data, count, device=self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the adapters, continued where a rung ended, and a schedule that depends on the step alone."""
        named = [(name, p) for name, p in self.backbone.trainable_parameters() if p.numel()]
        if not named:
            raise ConfigurationError("nothing to train: every layer has rank 0; give some layer a higher rank")
        optimizer = self.make_optimizer([p for _, p in named], self.trainer)
        self.continuation.restore_moments(optimizer, named)
        self._follow(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": self.make_schedule(optimizer, self.trainer, self.first_step)}

    def _require(self, way: Way, cure: str) -> None:
        if refusal := self.backbone.adapters.method.refusal(way):
            raise ConfigurationError(f"{refusal}: {cure}")

    def _follow(self, optimizer: AdamW) -> None:
        if str(self.trainer.precision) == "16-mixed":
            self._require("scaled gradients", "leave --trainer.precision out")
        after = self._after = self.backbone.adapters.after_steps(self.total_steps(self.trainer))
        if after is not None:
            after.load(self.continuation.allocation)
            # After the optimiser's step, when the gradients are still there; Lightning has not counted the step yet.
            optimizer.register_step_post_hook(lambda *_: after.step(self.first_step + self.global_step + 1))

    def total_steps(self, trainer: Trainer) -> int:
        """Optimiser steps of the whole schedule."""
        return self.schedule_steps or int(trainer.estimated_stepping_batches)

    def make_optimizer(
        self, parameters: Iterable[torch.nn.Parameter], trainer: Trainer, options: FineTuneOptions | None = None
    ) -> AdamW:
        """AdamW over some parameters, with the active options or others, for the precision of a trainer."""
        chosen = self.active_options if options is None else options
        return adamw(chosen, parameters, rate_factor=self.rate_factor, precision=str(trainer.precision))

    def make_schedule(
        self, optimizer: Optimizer, trainer: Trainer, start: int, options: FineTuneOptions | None = None
    ) -> LRSchedulerConfigType:
        """Learning rate schedule, as Lightning takes it, of a training that begins after `start` steps."""
        chosen = self.active_options if options is None else options
        return step_schedule(chosen, optimizer, start=start, total=self.total_steps(trainer))

    @property
    def rate_factor(self) -> float:
        """The adapter method's, times the learning rate."""
        return self.backbone.adapters.method.learning_rate_factor

    def training_state(self) -> TrainingState:
        """What continuing needs, copied to the CPU; to be called right after `Trainer.fit`."""
        optimizer = cast("AdamW", self.optimizers(use_pl_optimizer=False))
        moments = moments_of(optimizer, self.backbone.trainable_parameters())
        moments |= self._after.state() if self._after is not None else {}
        adapter = {name: value.detach().cpu().clone() for name, value in self.backbone.adapter_state().items()}
        steps = self.first_step + self.global_step
        return TrainingState(steps, adapter, moments, torch.get_rng_state(), device_random_state(self.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the adapters, for the frozen weights come from the model, and the random states."""
        self.observe()
        FitCheckpoint(
            str(self.configuration),
            self.backbone.adapter_state(),
            self._after.state() if self._after is not None else {},
            torch.get_rng_state(),
            device_random_state(self.device),
            dtype_name(self.backbone.compute_dtype),
        ).write(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the adapters in place; raises `ConfigurationError` when they are of another configuration or damaged."""
        path = None if self._trainer is None else self.trainer.ckpt_path
        if path and Path(path).is_file():
            require_intact_archive(Path(path))
        loaded = FitCheckpoint.take(checkpoint, str(self.configuration))
        self._note_dtype(loaded.compute_dtype)
        self.backbone.load_adapter_state(loaded.adapter)
        self.continuation = Continuation(loaded=replace(loaded, adapter={}))

    def _note_dtype(self, trained: str | None) -> None:
        own = dtype_name(self.backbone.compute_dtype)
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fits and own != (trained or dtype_name(resolve_dtype("auto"))):
            before = trained or "a dtype that it does not say, float32 unless another was given,"
            self.backbone.say(
                f"the checkpoint was trained in {before} and goes on in {own}; give --model.compute_dtype=float32, or "
                "whatever it was, to go on as it began"
            )

    # Scoring

    @property
    def shared_length(self) -> int:
        """Tokens that a scored row in which choices share a prompt may have; 0 when the model cannot take such rows."""
        if self._shared_length is None:
            self._shared_length = shared_length(self.backbone.model)
            if not self._shared_length:
                _logger.warning("the model cannot score choices that share a prompt: each is scored with its own")
        return self._shared_length

    @property
    def scored_model(self) -> nn.Module:
        """The model that is scored."""
        return self.backbone.model

    def on_validation_epoch_start(self) -> None:
        """Round the adapters to what is stored; in the midst of training, that is told anew."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.observe()
        super().on_validation_epoch_start()

    def stored_precision(self) -> AbstractContextManager[None]:
        """Context in which the adapters have the 16-bit values that are stored."""
        return self.backbone.stored_precision()

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter for plain PEFT."""
        assert self.configuration is not None
        self.backbone.save_adapter(directory, self.configuration)
