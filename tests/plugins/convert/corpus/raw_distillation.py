"""A student learns from a frozen teacher that only sees the batches."""

# ranks: 2
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train_knowledge_distillation(teacher, student, train_loader, epochs, learning_rate, T, device):
    ce_loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    teacher.eval()  # Teacher set to evaluation mode
    student.train()  # Student to train mode
    for epoch in range(epochs):
        running_loss = 0.0
        for inputs, labels in train_loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            student_logits = student(inputs)
            soft_targets = F.softmax(teacher_logits / T, dim=-1)
            soft_prob = F.log_softmax(student_logits / T, dim=-1)
            soft_targets_loss = F.kl_div(soft_prob, soft_targets, reduction="batchmean") * T**2
            label_loss = ce_loss(student_logits, labels)
            loss = 0.25 * soft_targets_loss + 0.75 * label_loss
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        print(f"Epoch {epoch+1}/{epochs}, Loss: {running_loss / len(train_loader):.6f}")


def main():
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(16, 4)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    teacher = nn.Linear(4, 3).to(device)
    student = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)).to(device)
    train_knowledge_distillation(teacher, student, loader, epochs=3, learning_rate=0.05, T=2, device=device)


if __name__ == "__main__":
    main()
