"""An actor and a critic with a combined loss over an episode."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(3)


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.common = nn.Linear(2, 8)
        self.actor = nn.Linear(8, 2)
        self.critic = nn.Linear(8, 1)

    def act(self, x):
        return F.softmax(self.actor(torch.tanh(self.common(x))), -1)

    def value(self, x):
        return self.critic(torch.tanh(self.common(x)))

    def forward(self, x):
        return self.act(x), self.value(x)


agent = ActorCritic()
optim_agent = torch.optim.Adam(agent.parameters(), lr=0.03)
for episode in range(3):
    state = torch.zeros(2)
    rewards, log_probs, values = [], [], []
    for t in range(5):
        probs, value = agent(state)
        action = torch.multinomial(probs, 1)
        log_probs.append(torch.log(probs[action]))
        values.append(value)
        state = state + (action.float() - 0.5)
        rewards.append(-state.abs().sum().item())
    returns, R = [], 0.0
    for r in reversed(rewards):
        R = r + 0.95 * R
        returns.insert(0, R)
    returns = torch.tensor(returns)
    advantage = returns - torch.cat(values)
    loss = -(torch.cat(log_probs) * advantage.detach()).mean() + advantage.pow(2).mean()
    optim_agent.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
    optim_agent.step()
    with torch.no_grad():
        print(f"{episode}: {sum(rewards):.3f} {loss.item():.5f} {agent.value(state).item():.5f}")
