"""Tokens of text: pieces of words found by byte-pair encoding. Sennrich, Haddow, Birch 2016, arXiv:1508.07909."""

import functools
import itertools
import re
from collections import Counter, defaultdict

WORDS = re.compile(rb"[A-Za-z]+|[0-9]|\s+|[^A-Za-z0-9\s]")


class BytePairs:
    """A vocabulary: the 256 bytes, and pairs of tokens that are often neighbours inside a word, in order of merging."""

    def __init__(self, merges: list[tuple[int, int]]):
        self.rank = {pair: 256 + index for index, pair in enumerate(merges)}
        self.pieces = [bytes([value]) for value in range(256)]
        for left, right in merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._word = functools.lru_cache(maxsize=None)(self._split)

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def train(cls, text: bytes, size: int, words: int = 4000) -> "BytePairs":
        """A vocabulary of `size` tokens from the commonest `words` of a text."""
        counts = Counter(WORDS.findall(text)).most_common(words)
        tokens = [list(word) for word, _ in counts]
        pairs, places = Counter(), defaultdict(set)
        for index, word in enumerate(tokens):
            for pair in itertools.pairwise(word):
                pairs[pair] += counts[index][1]
                places[pair].add(index)
        merges = []
        while len(merges) < size - 256 and pairs:
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            merges.append(best)
            for index in list(places[best]):
                word, count = tokens[index], counts[index][1]
                for pair in itertools.pairwise(word):
                    pairs[pair] -= count
                    places[pair].discard(index)
                tokens[index] = word = _merged(word, best, 255 + len(merges))
                for pair in itertools.pairwise(word):
                    pairs[pair] += count
                    places[pair].add(index)
            pairs = Counter({pair: count for pair, count in pairs.items() if count > 0})
        return cls(merges)

    def _split(self, word: bytes) -> tuple[int, ...]:
        tokens = list(word)
        while len(tokens) > 1:
            found = [(self.rank[pair], pair) for pair in itertools.pairwise(tokens) if pair in self.rank]
            if not found:
                break
            rank, pair = min(found)
            tokens = _merged(tokens, pair, rank)
        return tuple(tokens)

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return [token for word in WORDS.findall(text) for token in self._word(word)]

    def decode(self, tokens: list[int]) -> bytes:
        """The text of tokens."""
        return b"".join(self.pieces[token] for token in tokens)


def _merged(tokens: list[int], pair: tuple[int, int], new: int) -> list[int]:
    result, index = [], 0
    while index < len(tokens):
        both = tuple(tokens[index : index + 2]) == pair
        result.append(new if both else tokens[index])
        index += 2 if both else 1
    return result
