"""Proximal policy optimisation: a rollout of several games, methods besides forward, minibatches of own indices"""

import numpy as np
import torch
from torch import nn, optim
from torch.distributions.categorical import Categorical

# + from plugframe import Lite


class Line:
    """Games on a line: walk to the right; 12 steps each."""

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self):
        self.position, self.time = np.random.uniform(-1, 1, self.num_envs), 0
        return self.observe()

    def observe(self):
        return np.stack([self.position, np.full(self.num_envs, self.time / 12)], 1).astype(np.float32)

    def step(self, action):
        self.position = np.clip(self.position + np.where(action > 0, 0.2, -0.2), -2, 2)
        self.time += 1
        done = self.time == 12
        reward = self.position.copy()
        return (self.reset() if done else self.observe()), reward, np.full(self.num_envs, float(done))


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def get_value(self, x):
        return self.critic(x)

    def get_action_and_value(self, x, action=None):
        probs = Categorical(logits=self.actor(x).float())
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


num_envs, num_steps, num_minibatches = 8, 24, 4
np.random.seed(1)  # -
torch.manual_seed(1)  # -
# + lite = Lite()
# + lite.seed_everything(1, per_rank=True)
# + num_envs = num_envs // lite.world_size
batch_size = num_envs * num_steps
minibatch_size = batch_size // num_minibatches
agent = Agent()
optimizer = optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
# + agent, optimizer = lite.setup(agent, optimizer)
envs = Line(num_envs)
next_obs, next_done = torch.tensor(envs.reset()), torch.zeros(num_envs)
history = []
for iteration in range(1, 7):
    obs, actions = torch.zeros(num_steps, num_envs, 2), torch.zeros(num_steps, num_envs)
    logprobs, rewards, dones, values = (torch.zeros(num_steps, num_envs) for _ in range(4))
    for step in range(num_steps):
        obs[step], dones[step] = next_obs, next_done
        with torch.no_grad():
            action, logprob, _, value = agent.get_action_and_value(next_obs)
        values[step], actions[step], logprobs[step] = value.flatten(), action, logprob
        observed, reward, done = envs.step(action.numpy())
        rewards[step], next_obs, next_done = torch.tensor(reward), torch.tensor(observed), torch.tensor(done).float()
    with torch.no_grad():
        next_value = agent.get_value(next_obs).reshape(1, -1)
        advantages, last = torch.zeros_like(rewards), 0
        for t in reversed(range(num_steps)):
            nonterminal = 1.0 - (next_done if t == num_steps - 1 else dones[t + 1])
            following = next_value if t == num_steps - 1 else values[t + 1]
            delta = rewards[t] + 0.95 * following * nonterminal - values[t]
            advantages[t] = last = delta + 0.95 * 0.9 * nonterminal * last
        returns = advantages + values
    b_obs, b_actions = obs.reshape(-1, 2), actions.reshape(-1)
    b_logprobs, b_advantages, b_returns = logprobs.reshape(-1), advantages.reshape(-1), returns.reshape(-1)
    b_inds = np.arange(batch_size)
    for _epoch in range(3):
        np.random.shuffle(b_inds)
        for start in range(0, batch_size, minibatch_size):
            mb = b_inds[start : start + minibatch_size]
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb], b_actions[mb])
            ratio = (newlogprob - b_logprobs[mb]).exp()
            mb_advantages = b_advantages[mb]
            mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * torch.clamp(ratio, 0.8, 1.2)).mean()
            v_loss = 0.5 * ((newvalue.view(-1) - b_returns[mb]) ** 2).mean()
            loss = pg_loss - 0.01 * entropy.mean() + 0.5 * v_loss
            optimizer.zero_grad()
            loss.backward()  # -
            # + lite.backward(loss)
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)  # -
            # + lite.clip_gradients(agent, optimizer, max_norm=0.5)
            optimizer.step()
    mine = rewards.sum(0).mean() / 2
    history.append(mine.item())
    # + mine = lite.reduce_mean(mine, weight=num_envs)
    print(f"iteration {iteration} return {mine.item():.2f}")  # -
    # + lite.print(f"iteration {iteration} return {mine.item():.2f}")
