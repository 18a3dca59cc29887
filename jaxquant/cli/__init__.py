"""The command line: `jaxquant quantize | evaluate | inspect | bench | demo`."""

from ._main import main as main
