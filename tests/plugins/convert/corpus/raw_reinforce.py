"""REINFORCE with an environment of its own: no loader at all."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.distributions import Categorical


class Corridor:
    def reset(self):
        self.position = 2
        return self.observe()

    def observe(self):
        return F.one_hot(torch.tensor(self.position), 5).float()

    def step(self, action):
        self.position += 1 if action == 1 else -1
        done = self.position in (0, 4)
        return self.observe(), float(self.position == 4), done


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine = nn.Linear(5, 2)
        self.saved_log_probs = []
        self.rewards = []

    def forward(self, x):
        return F.softmax(self.affine(x), dim=0)


policy = Policy()
optimizer = optim.Adam(policy.parameters(), lr=1e-1)
env = Corridor()


def select_action(state):
    probs = policy(state)
    m = Categorical(probs)
    action = m.sample()
    policy.saved_log_probs.append(m.log_prob(action))
    return action.item()


def finish_episode():
    R = 0
    policy_loss = []
    returns = []
    for r in policy.rewards[::-1]:
        R = r + 0.9 * R
        returns.insert(0, R)
    for log_prob, R in zip(policy.saved_log_probs, returns):
        policy_loss.append(-log_prob * R)
    optimizer.zero_grad()
    policy_loss = torch.stack(policy_loss).sum()
    policy_loss.backward()
    optimizer.step()
    del policy.rewards[:]
    del policy.saved_log_probs[:]
    return policy_loss.item()


def main():
    torch.manual_seed(7)
    for i_episode in range(4):
        state, ep_reward = env.reset(), 0
        for t in range(1, 8):
            action = select_action(state)
            state, reward, done = env.step(action)
            policy.rewards.append(reward)
            ep_reward += reward
            if done:
                break
        loss = finish_episode()
        print(f"episode {i_episode} reward {ep_reward} loss {loss:.5f}")


if __name__ == "__main__":
    main()
