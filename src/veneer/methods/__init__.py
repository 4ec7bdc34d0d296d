"""One file a method. Importing this package enters them all into the registry."""

from veneer.methods import adalora as adalora
from veneer.methods import bias as bias
from veneer.methods import dora as dora
from veneer.methods import lora as lora
from veneer.methods import lora_calibrate as lora_calibrate
from veneer.methods import lora_init as lora_init
from veneer.methods import saved as saved
from veneer.methods import tokens as tokens
