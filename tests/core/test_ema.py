import torch

from ddpm.core.ema import EMA
from ddpm.core.unet import UNet
from tests.conftest import small_unet


def test_the_average_warms_up_and_is_never_the_live_weights():
    model = UNet(small_unet().config)
    ema = EMA(model, decay=0.99)
    start = [p.clone() for p in ema.model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(step=0)  # decay 1/10
    for average, before, live in zip(ema.model.parameters(), start, model.parameters(), strict=True):
        torch.testing.assert_close(average, before + 0.9)
        assert not torch.equal(average, live)
    ema.update(step=10_000)  # decay 0.99
    for average, before in zip(ema.model.parameters(), start, strict=True):
        torch.testing.assert_close(average, before + 0.901)
    assert not ema.model.training
