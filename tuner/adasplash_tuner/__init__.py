"""Finds, stores and looks up the fastest kernel configs of this machine.

``adasplash tune`` searches (:mod:`adasplash_tuner.search`) and measures (:mod:`adasplash_tuner.measure`), the database keeps
(:mod:`adasplash_tuner.storage`), and the provider (:mod:`adasplash_tuner.provider`) answers the core's look-ups.
"""
