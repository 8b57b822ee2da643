"""Recordings that people have, as the folder layout: one module a kind behind one registry, one writer.

    alpacache convert KIND INPUT  --registry-->  Drives  --clips-->  pieces  --writer-->  folder:OUT

A kind knows its format's axes, units and clocks. All else is the same for every kind: where the pose stands, how a
drive is cut, what is copied and what encoded, going on after a kill, the report. Start reading in `drive`.
"""
