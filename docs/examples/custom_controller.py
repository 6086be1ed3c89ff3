"""A loop that needs single steps: what is seen next depends on what was answered. Guess a number from "lower" and "higher"."""

import argparse

import torch
from torch import nn

from mann_kernels import MANNCell


class Guesser(nn.Module):
    """An encoder of one's own, a MANNCell for the state and the memory, and a layer that names a number."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers = numbers
        self.encode = nn.Sequential(nn.Linear(numbers + 3, 32), nn.ReLU())
        self.cell = MANNCell(32, hidden_size=48, num_slots=16, slot_size=8, num_heads=1)
        self.answer = nn.Linear(48 + 8, numbers)

    def forward(self, secret: torch.Tensor, guesses: int) -> torch.Tensor:
        """secret int64 [B] -> logits [guesses, B, numbers]."""
        seen, state, logits = secret.new_zeros(len(secret), self.numbers + 3, dtype=torch.float32), None, []
        for _ in range(guesses):
            output, state = self.cell(self.encode(seen), state)
            logits.append(self.answer(output))
            guess = logits[-1].argmax(-1)
            reply = (secret - guess).sign() + 1  # 0 lower, 1 right, 2 higher
            seen = torch.cat([nn.functional.one_hot(guess, self.numbers), nn.functional.one_hot(reply, 3)], 1).float()
        return torch.stack(logits)


def main(updates: int, numbers: int = 8, guesses: int = 4, batch: int = 64) -> float:
    """The share of numbers known at the last guess, over the last updates."""
    torch.manual_seed(0)
    model = Guesser(numbers)
    optimizer, known = torch.optim.Adam(model.parameters(), 3e-3), 0.0
    for update in range(updates):
        secret = torch.randint(numbers, (batch,))
        logits = model(secret, guesses)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), secret.repeat(guesses))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        known = 0.95 * known + 0.05 * (logits[-1].argmax(-1) == secret).float().mean().item()
        if update % 100 == 99:
            print(f"{update + 1} updates: right at guess {guesses}: {known:.2f}", flush=True)
    return known


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=400)
    main(parser.parse_args().updates)
