"""Every small program the library is tested on."""

from models_latent import PROGRAMS as LATENT
from models_observed import PROGRAMS as OBSERVED
from models_ragged import PROGRAMS as RAGGED
from models_shapes import PROGRAMS as SHAPES

PROGRAMS = (*LATENT, *SHAPES, *RAGGED, *OBSERVED)
BY_NAME = {program.name: program for program in PROGRAMS}
