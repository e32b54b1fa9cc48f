"""From files of text to arrays of tokens and back: sources, formats, chat templates, masks, batches."""

from alignax.data import batching as batching
from alignax.data import chat as chat
from alignax.data import formats as formats
from alignax.data import masks as masks
from alignax.data import text as text
from alignax.data import truncation as truncation
from alignax.data.batching import Position as Position
from alignax.data.batching import batches as batches
from alignax.data.formats import Example as Example
from alignax.data.formats import Pair as Pair
from alignax.data.formats import Prompt as Prompt
from alignax.data.formats import parse as parse
from alignax.data.rows import BadRow as BadRow
from alignax.data.rows import Dropped as Dropped
from alignax.data.rows import Row as Row
from alignax.data.rows import collect as collect
from alignax.data.rows import split as split
from alignax.data.rows import summary as summary
from alignax.data.sources import read as read
from alignax.data.tokens import TokenPair as TokenPair
from alignax.data.tokens import TokenPrompt as TokenPrompt
from alignax.data.tokens import TokenRow as TokenRow
from alignax.data.tokens import same_vocabulary as same_vocabulary
from alignax.data.tokens import tokenize_example as tokenize_example
from alignax.data.tokens import tokenize_pair as tokenize_pair
from alignax.data.tokens import tokenize_prompt as tokenize_prompt
