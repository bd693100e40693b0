from taming.modules.losses.vqperceptual import DummyLoss

__all__ = ["DummyLoss"]
