"""Q-learning with a replay memory and a target network."""

import random
from collections import deque

import torch
import torch.nn as nn
import torch.optim as optim

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class DQN(nn.Module):
    def __init__(self):
        super(DQN, self).__init__()
        self.layer = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layer(x)


random.seed(0)
torch.manual_seed(0)
policy_net = DQN().to(device)
target_net = DQN().to(device)
target_net.load_state_dict(policy_net.state_dict())
optimizer = optim.AdamW(policy_net.parameters(), lr=1e-2, amsgrad=True)
memory = deque([], maxlen=100)


def optimize_model():
    if len(memory) < 8:
        return None
    batch = random.sample(memory, 8)
    states = torch.stack([b[0] for b in batch]).to(device)
    actions = torch.tensor([[b[1]] for b in batch], device=device)
    following = torch.stack([b[2] for b in batch]).to(device)
    rewards = torch.tensor([b[3] for b in batch], device=device)
    values = policy_net(states).gather(1, actions)
    with torch.no_grad():
        expected = target_net(following).max(1).values * 0.9 + rewards
    criterion = nn.SmoothL1Loss()
    loss = criterion(values, expected.unsqueeze(1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(policy_net.parameters(), 100)
    optimizer.step()
    return loss.item()


for episode in range(3):
    state = torch.zeros(2)
    for t in range(6):
        if random.random() < 0.5:
            action = random.randrange(2)
        else:
            with torch.no_grad():
                action = policy_net(state.to(device)).argmax().item()
        following = state + torch.tensor([0.1, 0.2]) * (1 if action else -1)
        memory.append((state, action, following, float(following.sum())))
        state = following
        loss = optimize_model()
        target_net_state_dict = target_net.state_dict()
        for key, value in policy_net.state_dict().items():
            target_net_state_dict[key] = value * 0.1 + target_net_state_dict[key] * 0.9
        target_net.load_state_dict(target_net_state_dict)
    print(episode, "none" if loss is None else f"{loss:.6f}")
