"""Spreads a run over devices and hosts: the mesh, parameter shardings, and the processes."""
