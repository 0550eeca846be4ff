# torchrun --nproc-per-node 2 docs/examples/fsdp2.py
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import parabola

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
for layer in (model[0], model[2], model):
    fully_shard(layer)

optimizer = parabola.Shampoo(model.named_parameters(), lr=3e-3, block_size=64)

torch.manual_seed(dist.get_rank())  # every rank draws batches of its own
teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
for step in range(1, 101):
    x = torch.randn(32, 64)
    loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.2f}")

parabola.checkpoint.save("checkpoint", model, optimizer)  # for any number of ranks
dist.barrier()  # gloo's threads drop their last tensors before the interpreter ends
dist.destroy_process_group()
