"""Algorithm 1 of Munkhdalai & Yu 2017 for one task, one example after the other."""

import math

import torch
import torch.nn.functional as F

KIND = {"dtype": torch.float64}
EPS = torch.finfo(torch.float32).eps


class AlgorithmOne:
    """The paper's Algorithm 1 for one task, written from its text with nothing but torch and a network's parameters."""

    def __init__(self, metanet, second_order):
        self.net, self.second_order = metanet, second_order
        self.W = [metanet.base_learner[i].weight for i in (0, 1, 3, 4)]
        self.Q = [metanet.embedding[i].weight for i in (0, 1, 3)]
        self.head = metanet.embedding_head[1].weight

    @staticmethod
    def hidden(f, slow, fast):
        return F.relu(f(slow)) if fast is None else F.relu(f(slow)) + F.relu(f(fast))

    def features(self, x, slow, fast):
        """The two convolutions on one image."""
        for i in range(2):
            x = self.hidden(lambda w, x=x: F.conv2d(x, w, padding=1), slow[i], None if fast is None else fast[i])
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return x.flatten()

    def u(self, x, fast=None):
        h = self.features(x, self.Q, fast)
        return self.Q[2] @ h if fast is None else self.Q[2] @ h + fast[2] @ h

    def b(self, x, fast=None):
        W = self.W if fast is None or not self.net.fast_only else [torch.zeros_like(w) for w in self.W]
        h = self.features(x, W, fast)
        h = self.hidden(lambda w: w @ h, W[2], None if fast is None else fast[2])
        return W[3] @ h if fast is None else W[3] @ h + fast[3] @ h

    def gradient(self, loss, weights):
        grads = torch.autograd.grad(loss, weights, create_graph=self.second_order, retain_graph=True)
        return grads if self.second_order else [grad.detach() for grad in grads]

    @staticmethod
    def preprocess(g):
        return torch.stack([(torch.log(g.abs() + EPS) / 7).clamp(min=-1), (g * math.exp(7)).clamp(-1, 1)], -1)

    def module(self, group, weight):
        return group["all" if "all" in group else "conv" if weight.dim() == 4 else "linear"]

    def m(self, grads):
        fast = []
        for g in grads:
            fast.append(self.perceptron(self.module(self.net.generators, g), g))
        return fast

    def perceptron(self, p, g):
        h = F.relu(self.preprocess(g.flatten()) @ p.weight1.T + p.bias1)
        h = F.relu(h @ p.weight2.T + p.bias2)
        return (h @ p.weight3.T + p.bias3).reshape(g.shape)

    def d(self, steps):
        fast = []
        for gradients in zip(*steps, strict=True):
            p = self.module(self.net.summarizers, gradients[0])
            if self.net.summarizer == "mean":
                fast.append(self.perceptron(p, sum(gradients) / len(gradients)))
                continue
            h = c = torch.zeros(gradients[0].numel(), p.hidden_size, **KIND)
            for g in gradients:
                gates = self.preprocess(g.flatten()) @ p.weight_ih.T + h @ p.weight_hh.T + p.bias
                i, f, u, o = gates.chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
                h = torch.sigmoid(o) * torch.tanh(c)
            fast.append((h @ p.weight_out.T + p.bias_out).reshape(gradients[0].shape))
        return fast

    def chunk_means(self, gradients):
        """T chunks in order, and of each the mean gradient, which is the gradient of the mean loss."""
        size = max(len(gradients) // self.net.summary_steps, 1)
        chunks = [gradients[i : i + size] for i in range(0, len(gradients), size)]
        return [[sum(grads) / size for grads in zip(*chunk, strict=True)] for chunk in chunks]

    def embedding_losses(self, x, y, pairs):
        if pairs is None:
            for i in range(len(y)):
                yield F.cross_entropy(self.head @ F.relu(self.u(x[i : i + 1])), y[i])
            return
        for i, j in pairs.tolist():
            distance = (self.u(x[i : i + 1]) - self.u(x[j : j + 1])).norm()
            same = y[i] == y[j]
            yield distance**2 / 2 if same else F.relu(self.net.margin - distance) ** 2 / 2

    def __call__(self, support_x, support_y, query_x, pairs=None):
        task_fast, base_fast = None, None
        if self.net.variant != "metanet-":
            losses = self.embedding_losses(support_x, support_y, pairs)
            task_fast = self.d(self.chunk_means([self.gradient(loss, self.Q) for loss in losses]))
        memory, index, gradients = [], [], []
        for i in range(len(support_y)):
            x = support_x[i : i + 1]
            gradients.append(self.gradient(F.cross_entropy(self.b(x), support_y[i]), self.W))
            memory.append(self.m(gradients[-1]))
            index.append(self.u(x, task_fast))
        if self.net.variant == "metanet+":
            base_fast = self.d(self.chunk_means(gradients))
        logits = []
        for i in range(len(query_x)):
            r = self.u(query_x[i : i + 1], task_fast)
            cosines = [(r @ key) / torch.sqrt((r @ r) * (key @ key) + 1e-6) for key in index]
            a = torch.softmax(torch.stack(cosines), 0)
            fast = [sum(w * row for w, row in zip(a, rows, strict=True)) for rows in zip(*memory, strict=True)]
            if base_fast is not None:
                fast = [one + other for one, other in zip(fast, base_fast, strict=True)]
            logits.append(self.b(query_x[i : i + 1], fast))
        return torch.stack(logits)
