"""Meta Networks (Munkhdalai & Yu 2017): slow weights, fast weights generated from loss gradients, and a memory of them."""

from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import nn

from mann_kernels.modules._autograd import autograd_takes, called_with_autograd, refuse_freed_weights, with_parameters
from mann_kernels.modules._init import flag
from mann_kernels.modules._metanet_input import check_queries, check_state, check_support, examples_are_alike
from mann_kernels.modules._metanet_losses import contrastive, cross_entropy, random_pairs
from mann_kernels.modules._metanet_networks import Conv2d, hidden_conv, networks
from mann_kernels.modules.augmented import AugmentedConv2d, AugmentedLinear, AugmentedSequential
from mann_kernels.modules.generators import FastWeightGenerator, FastWeightMemory, GradientSummarizer
from mann_kernels.modules.state import MetaNetState
from mann_kernels.ops._check import at_least_one, known_options, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: What layers do that take each example by itself: support examples and queries may go through them in one pass.
ONE_BY_ONE = tuple(
    layer.forward
    for layer in (nn.Linear, AugmentedLinear, nn.Conv2d, AugmentedConv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten)
)


class MetaNetOptions(TypedDict, total=False):
    """The arguments of a MetaNet that its presets hand on to it, all of them optional."""

    variant: str
    second_order: bool
    summary_steps: int
    summarizer: str
    shared_generators: bool
    fast_only: bool
    hidden_size: int
    p: float
    margin: float
    eps: float


class MetaNet(nn.Module):
    """A meta network (Munkhdalai & Yu 2017, Algorithm 1): learns the classes of a support set in one pass over it.

    Args:
        base_learner: b, an AugmentedSequential from examples to logits. Its augmented layers get example-level fast weights.
        embedding: u, an AugmentedSequential from examples to keys [.., K]. Its augmented layers get task-level fast weights.
        embedding_head: from keys to logits, for the embedding's own loss where there is one support example of each
            class. It has no fast weights, and to first order no gradient: it stays what it was at first.
        variant: "metanet"; "metanet-" has no task-level fast weights; "metanet+" has them in the base learner too (the
            same d of the gradients of b), added to the mixture of the example-level ones.
        second_order: differentiate through the support gradients. Without it (as the original code) they are constants.
        summary_steps: T at most. The S support examples are taken in T = min(S, summary_steps) chunks of equal size, in
            order (so S must be a multiple of T), and d sees the gradients of their mean losses. Where there is more
            than one example of a class, T is the number of random pairs.
        summarizer: what d is: "lstm", a GradientSummarizer over the T gradients; or "mean", a FastWeightGenerator of their
            mean, so that their order does not matter (section 3.1 of the paper, which found that it converges worse).
        shared_generators: one m and one d as in the paper; without it one of each for convolutions and one for linear
            layers, as in the original code.
        fast_only: the base learner predicts with fast weights alone; its slow ones only make the gradients that those come
            from. An ablation of the paper, which did not converge.
        hidden_size: units of m and d.
        p: of the gradients' preprocessing in m and d.
        margin: of the contrastive loss.
        eps: inside the root of the cosine's denominator.
        device: of the parameters of m and d.
        dtype: of the parameters of m and d.

    Shapes:
        support_x [G, S, ...], support_y int64 [G, S] with labels in 0..ways-1, query_x [G, L, ...] -> logits [G, L, ways],
        for G tasks at once, each as if alone; or all of them without G.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants. Labels on a GPU are waited for; they are
            not looked at while torch.compile traces or a CUDA graph is captured.

    The loss of the embedding is cross-entropy where each class has one support example, else the contrastive loss
    (Chopra et al. 2005) of random pairs (eq. 6 and 7), `D^2/2` for a pair of one class and `max(0, margin - D)^2/2` for
    another, D the distance of the keys.

    Attributes:
        fewer_classes: set to True, support sets may lack classes, with one example of each that is there: a network for
            `ways` classes in tasks of fewer.
    """

    fewer_classes: bool = False

    def __init__(
        self, base_learner: AugmentedSequential, embedding: AugmentedSequential, embedding_head: nn.Module, *,
        variant: str = "metanet", second_order: bool = False, summary_steps: int = 5, summarizer: str = "lstm",
        shared_generators: bool = False, fast_only: bool = False, hidden_size: int = 20, p: float = 7.0,
        margin: float = 1.0, eps: float = 1e-6,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        known_options(variant=variant, summarizer=summarizer)
        at_least_one(summary_steps=summary_steps)
        number("margin", margin, 0)
        for name, value in {
            "second_order": second_order,
            "shared_generators": shared_generators,
            "fast_only": fast_only,
        }.items():
            flag(name, value)
        for name, network in {"base_learner": base_learner, "embedding": embedding}.items():
            if not isinstance(network, AugmentedSequential):
                raise TypeError(f"{name}: got {type(network).__name__}, want an AugmentedSequential")
            if not network.augmented:
                raise ValueError(f"{name}: got no augmented layer, want at least one")
        self.base_learner, self.embedding, self.embedding_head = base_learner, embedding, embedding_head
        self.variant, self.second_order, self.summary_steps, self.margin = variant, second_order, summary_steps, margin
        self.summarizer, self.shared_generators, self.fast_only = summarizer, shared_generators, fast_only
        self.memory = FastWeightMemory(eps=eps)
        options: dict[str, Any] = {"p": p, "device": device, "dtype": dtype}
        summarized = {"metanet-": [], "metanet": [embedding], "metanet+": [embedding, base_learner]}[variant]
        self.generators = self._for_kinds(lambda: FastWeightGenerator(hidden_size, **options), [base_learner])
        d = GradientSummarizer if summarizer == "lstm" else FastWeightGenerator
        self.summarizers = self._for_kinds(lambda: d(hidden_size, **options), summarized)

    def _kind(self, layer) -> str:
        return "all" if self.shared_generators else "conv" if isinstance(layer, AugmentedConv2d) else "linear"

    def _for_kinds(self, make, networks) -> nn.ModuleDict:
        kinds = dict.fromkeys(self._kind(layer) for network in networks for layer in network.augmented)
        return nn.ModuleDict({kind: make() for kind in kinds})

    @classmethod
    def omniglot(
        cls, ways: int = 5, *, filters: int = 64,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        **options: "Unpack[MetaNetOptions]",
    ) -> "MetaNet":  # fmt: skip
        """The paper's Omniglot network, for images [1, 28, 28]: 5 convolutions 3 x 3 with 64 filters, each followed by a
        2 x 2 max-pool in ceil mode, one hidden linear layer and the classes, without biases; all layers augmented. At
        5 ways 148,032 + 4,416 fast weights for each support example. `options` are MetaNet's."""
        at_least_one(ways=ways, filters=filters)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}

        def body():
            convolutions = (hidden_conv(channels, filters, **kind) for channels in (1, *[filters] * 4))
            return [*convolutions, nn.Flatten()]

        base, embedding, head = networks(body, body, filters, ways, **kind)
        return cls(base, embedding, head, device=device, dtype=dtype, **options)

    @classmethod
    def mini_imagenet(
        cls, ways: int = 5, *, filters: int = 32, batch_norm: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        **options: "Unpack[MetaNetOptions]",
    ) -> "MetaNet":  # fmt: skip
        """The paper's mini-ImageNet network, for images [3, 84, 84]: as `omniglot` with 32 filters, the first three
        convolutions without fast weights. At 5 ways 18,432 + 84,384 fast weights for each support example.

        batch_norm: after the first three convolutions, as the original code has and the paper does not say. In training
        mode the statistics are of all examples of a call, so the tasks of a batch then depend on each other.
        `options` are MetaNet's."""
        at_least_one(ways=ways, filters=filters)
        flag("batch_norm", batch_norm)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}

        def body():
            layers = []
            for channels in (3, filters, filters):
                layers.append(Conv2d(channels, filters, 3, padding=1, bias=False, **kind))
                layers += [nn.BatchNorm2d(filters, **kind)] if batch_norm else []
                layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            return [*layers, *(hidden_conv(filters, filters, **kind) for _ in range(2)), nn.Flatten()]

        base, embedding, head = networks(body, body, 9 * filters, ways, **kind)
        return cls(base, embedding, head, device=device, dtype=dtype, **options)

    @property
    def ways(self) -> int:
        """How many classes a task has: the outputs of the base learner's last augmented layer."""
        return self.base_learner.augmented[-1].fast_shape[0]

    def forward(
        self, support_x: torch.Tensor, support_y: torch.Tensor, query_x: torch.Tensor, *,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:  # fmt: skip
        # the keys of all examples from one pass, where no layer can mix examples
        together = examples_are_alike(support_x, support_y, query_x)
        if not (together and all(type(layer).forward in ONE_BY_ONE for layer in self.embedding)):
            return self.predict(query_x, self.adapt(support_x, support_y, generator=generator))
        state = self._checked_adapt(support_x, support_y, generator, query_x)
        check_queries(query_x, state, support_y.dim() == 1)
        index, key = state.index.split([support_y.shape[-1], query_x.shape[support_y.dim() - 1]], -2)
        return self._logits(query_x, state._replace(index=index), key)

    def adapt(
        self, support_x: torch.Tensor, support_y: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> MetaNetState:
        """Lines 1 to 14 of Algorithm 1: what the support set teaches, for any number of calls of `predict`.

        generator: draws the pairs of the contrastive loss (on the CPU); None is torch's own.
        """
        return self._checked_adapt(support_x, support_y, generator)

    def _checked_adapt(self, support_x, support_y, generator, query_x=None) -> MetaNetState:
        """Check the support set and adapt to it, with the keys of the queries, if any, at the end of `index`."""
        check_support(support_x, support_y, self.ways, self.fewer_classes)
        if self._create_graph:
            refuse_freed_weights(self)
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._adapt(autograd_takes(support_x), autograd_takes(support_y), generator, query_x)
        # gradients are taken in it; and so the state is one that autograd takes
        with torch.inference_mode(False), torch.no_grad():
            return self._adapt(autograd_takes(support_x), autograd_takes(support_y), generator, query_x)

    def _adapt(self, support_x, support_y, generator, query_x) -> MetaNetState:
        x, y = (support_x, support_y) if support_y.dim() == 1 else (support_x.flatten(0, 1), support_y.flatten())
        lead, S = support_y.shape[:-1], support_y.shape[-1]
        task_fast = None
        if self.variant != "metanet-":
            of_chunks = self.embedding.loss_gradients(
                *self._embedding_losses(x, y, S, generator), create_graph=self._create_graph
            )
            task_fast = self._summarize(self.embedding, of_chunks, lead)
        gradients = self.base_learner.loss_gradients(x, cross_entropy(y, 1), len(y), create_graph=self._create_graph)
        memory = self._fast(self.generators, self.base_learner, gradients)
        memory = with_parameters(memory.unflatten(0, support_y.shape) if lead else memory, self.embedding_head)
        with_queries = support_x if query_x is None else torch.cat([support_x, query_x], len(lead))
        index = self._key(with_queries, task_fast, bool(lead))
        if self.variant == "metanet+":
            summary = self._summarize(self.base_learner, gradients, lead, self._size_of_chunks(S))
            memory = torch.cat([memory, summary.unsqueeze(-2)], -2)
        return MetaNetState(index, memory, task_fast)

    def predict(self, query_x: torch.Tensor, state: MetaNetState) -> torch.Tensor:
        """Lines 16 to 20 of Algorithm 1: the logits of queries, given what `adapt` returned."""
        alone = check_state(state, self)
        check_queries(query_x, state, alone)
        return self._logits(query_x, state, self._key(query_x, state.task_fast, not alone))

    def _logits(self, query_x, state: MetaNetState, key) -> torch.Tensor:
        """Compute the base learner's logits of queries that have these keys."""
        mix = self.memory(state.index, key)
        if self.variant == "metanet+":
            mix = F.pad(mix, (0, 1), value=1.0)
        fast = self.base_learner.split(state.memory)
        return self.base_learner(query_x, fast, mix, slow=not self.fast_only, tasks=key.dim() == 3)

    @property
    def _create_graph(self) -> bool:
        return self.second_order and torch.is_grad_enabled()

    def _key(self, x: torch.Tensor, task_fast: torch.Tensor | None, tasks: bool) -> torch.Tensor:
        """Compute the keys of examples, u(Q, Q*, x) of eq. 5; tasks: there is a dimension G."""
        fast = None if task_fast is None else self.embedding.split(task_fast.unsqueeze(-2))  # one row
        return called_with_autograd(self.embedding, x, fast, tasks=tasks)

    def _size_of_chunks(self, S: int) -> int:
        """m = S/T, the examples of each loss whose gradient d sees."""
        T = min(S, self.summary_steps)
        if S % T:
            raise ValueError(f"support_x: got {S} examples (S), want a multiple of summary_steps={T}")
        return S // T

    def _embedding_losses(self, x, y, S: int, generator):
        """The examples [G*T*m, ...] of T losses of the embedding for each task, their sum as a function of the keys, and how many
        losses there are (eq. 2, 3, 6, 7); x [G*S, ...], y [G*S]."""
        if self.ways >= S:  # one example of each, of all classes or fewer
            m = self._size_of_chunks(S)
            losses = cross_entropy(y, m)

            def of_keys(key):
                # the head may write into what it gets
                return losses(called_with_autograd(self.embedding_head, key.clone()))

            return x, of_keys, len(y) // m
        G = len(y) // S
        pairs = random_pairs(G, S, self.summary_steps, generator)
        pairs = (pairs + S * torch.arange(G, device="cpu")[:, None, None]).flatten().to(y.device)
        labels = y[pairs].view(-1, 2)
        return x[pairs], contrastive(labels[:, 0] == labels[:, 1], self.margin), len(labels)

    def _summarize(self, network: AugmentedSequential, gradients: list[torch.Tensor], lead: torch.Size, m: int = 1):
        """eq. 4: d of the gradients of T losses in each of the tasks `lead`, each the mean of m of those given -> [*lead, P]."""

        def steps_first(grads):
            grads = grads.unflatten(0, (-1, m)).mean(1) if m > 1 else grads
            grads = grads.unflatten(0, (*lead, -1)).transpose(0, 1) if lead else grads
            return grads.mean(0) if self.summarizer == "mean" else grads

        return self._fast(self.summarizers, network, gradients, steps_first)

    def _fast(
        self, made_by: nn.ModuleDict, network: AugmentedSequential, gradients: list[torch.Tensor],
        arranged=lambda grads: grads,
    ) -> torch.Tensor:  # fmt: skip
        """What the generators make of the gradients of each augmented layer, [n, P_i], as one tensor [.., P]: one call of each, on
        what `arranged` makes of its gradients."""
        kinds = [self._kind(layer) for layer in network.augmented]
        firsts = list(dict.fromkeys(kinds))
        order = [i for kind in firsts for i in range(len(kinds)) if kinds[i] == kind]
        grads = [torch.cat([gradients[i] for i in order if kinds[i] == kind], -1) for kind in firsts]
        fast = [made_by[kind](arranged(grad)) for kind, grad in zip(firsts, grads, strict=True)]
        if order != sorted(order):  # the layers of a kind are not all together
            sizes = [gradients[i].shape[-1] for i in order]
            parts = dict(zip(order, torch.cat(fast, -1).split(sizes, -1), strict=True))
            fast = [parts[i] for i in sorted(order)]
        return fast[0] if len(fast) == 1 else torch.cat(fast, -1)

    def extra_repr(self) -> str:
        text = f"variant={self.variant!r}, second_order={self.second_order}, summary_steps={self.summary_steps}"
        text += f", summarizer={self.summarizer!r}"
        text += f", shared_generators={self.shared_generators}, fast_only={self.fast_only}"
        return f"{text}, margin={self.margin}"
