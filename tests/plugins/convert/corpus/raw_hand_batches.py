"""Batches are slices of a tensor: no loader."""

# ranks: 2
import torch
from torch import nn, optim

torch.manual_seed(0)
bs, lr, epochs = 4, 0.2, 2
x_train = torch.randn(16, 3)
y_train = x_train[:, :2].argmax(1)
n = x_train.shape[0]


def get_model():
    model = nn.Sequential(nn.Linear(3, 2))
    return model, optim.SGD(model.parameters(), lr=lr)


loss_func = nn.functional.cross_entropy
model, opt = get_model()
for epoch in range(epochs):
    for i in range((n - 1) // bs + 1):
        start_i = i * bs
        end_i = start_i + bs
        xb = x_train[start_i:end_i]
        yb = y_train[start_i:end_i]
        pred = model(xb)
        loss = loss_func(pred, yb)

        loss.backward()
        opt.step()
        opt.zero_grad()

print(loss_func(model(xb), yb).item())
