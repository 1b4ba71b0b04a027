import torch

from ddpm.config.load import check
from ddpm.core.unet import UNet
from ddpm.training.setup import unet_config
from tests.conftest import composed


def test_the_papers_network_has_the_papers_number_of_parameters():
    params = check(composed("model=paper", "dataset=cifar10"))
    with torch.device("meta"):
        unet = UNet(unet_config(params.model, 32, 3, learn_variance=False, classes=0, unlabelled=True))
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
