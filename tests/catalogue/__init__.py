"""Cases of training steps that go wrong, each inside a small real model, and of healthy ones that only look as if."""
