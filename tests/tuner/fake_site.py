"""A backend that a tuning process can load like any plugin: the reference's results, with configs that behave as told.

``SITE`` is the source of its module; :func:`install_backend` puts it where ``importlib.metadata`` finds it.
"""

from __future__ import annotations

from pathlib import Path

from tests.plugins.installing import install

SITE = """
    import os
    import signal
    import time
    from dataclasses import dataclass, replace

    from adasplash_core.backend import AttentionBackend, CompileReport, KernelConfig, KernelResources
    from adasplash_core.hookspecs import hookimpl
    from adasplash_torch.backend import TorchBackend
    from adasplash_torch.configs import ForwardConfig


    @dataclass(frozen=True)
    class Config(KernelConfig):
        block: int = 64
        does: str = "compute"


    class Fickle(TorchBackend):
        name = "fickle"
        summary = "computes, sleeps, dies or does not compile"
        priority = 10

        def config_class(self, pass_):
            return Config

        def default_config(self, spec, device, pass_):
            return Config(does=os.environ.get("FICKLE_DEFAULT", "compute") if spec.q_len == 96 else "compute")

        def tuning_space(self, spec, device, pass_):
            yield Config(block=32)
            for does in os.environ.get("FICKLE_SPACE", "").split():
                yield Config(block=128, does=does)
            yield Config(block=256)

        def precompile(self, spec, device, pass_, config):
            with open(os.environ["FICKLE_LOG"], "a") as log:
                log.write(f"compile {config.does} {config.block} {os.environ['CUDA_VISIBLE_DEVICES']!r}\\n")
            if config.does == "refuse":
                raise ValueError("no such instruction")
            if config.does == "abort":
                os.abort()
            if config.does == "hang":
                time.sleep(600)
            spilled = 4096 if config.does == "spill" else 0
            return CompileReport((KernelResources("kernel", registers=64, spilled=spilled, shared=1024),))

        def forward(self, call):
            config = call.config
            with open(os.environ["FICKLE_LOG"], "a") as log:
                log.write(f"run {config.does} {config.block}\\n")
            if config.does == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(0.004 if config.block == 256 else 0.012)
            return super().forward(replace(call, config=ForwardConfig(rows=64, panel=64)))


    @hookimpl
    def adasplash_register_backends(register):
        register(Fickle())
"""


def install_backend(site: Path) -> None:
    site.mkdir(exist_ok=True)
    install(site, "fickle_backend", SITE, plugin="fickle")
