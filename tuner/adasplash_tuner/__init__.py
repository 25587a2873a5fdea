"""Finds, stores and looks up the fastest kernel configs of this machine.

``adasplash tune`` measures (:mod:`adasplash_tuner.search`), the database keeps (:mod:`adasplash_tuner.store`), and the provider
(:mod:`adasplash_tuner.provider`) answers the core's look-ups.
"""
