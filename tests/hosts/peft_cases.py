"""What pytest collects of PEFT's tests once ``peft_plugin`` has put our cases into them."""

from peft_own_tests.test_config import *  # noqa: F403
from peft_own_tests.test_custom_models import *  # noqa: F403
