import pytest
import tiny
import torch

from k2kernels.engine.pool import Pool, extend_keys, root_key


def pool(num_pages=6):
    return Pool(tiny.config(), layers=2, num_pages=num_pages, rows=2, max_tokens=300)


def keys_of(ids, salt=""):
    keys = []
    extend_keys(keys, root_key(salt), ids)
    return keys


def filled(made, keys):
    """Pages under these keys, held once."""
    pages = made.take(len(keys))
    for page, key in zip(pages, keys):
        made.publish(page, key)
    return pages


def test_keys_name_all_ids_before():
    ids = list(range(200))
    keys = keys_of(ids)
    assert len(keys) == len(set(keys)) == 3
    assert keys_of(ids[:130]) == keys[:2] == keys_of([*ids[:128], 7, *ids[129:]])[:2]
    other = keys_of([9, *ids[1:]])
    assert not set(other) & set(keys) and not set(keys_of(ids, "tenant")) & set(keys)
    grown = keys_of(ids[:70])
    extend_keys(grown, root_key(), ids)
    assert grown == keys
    assert len(set(keys_of([5] * 192))) == 3  # equal pages at other places


def test_pages_are_held_idle_or_free():
    made, keys = pool(), keys_of(range(192))
    pages = filled(made, keys)
    made.share(pages[:2])
    made.check([pages, pages[:2]])
    made.release(pages)
    assert (made.held, made.idle, made.available) == (2, 1, 4)
    assert made.find(keys) == pages and made.find([b"", *keys]) == [] and made.unheld(pages) == 1
    made.release(pages[:2])
    assert (made.held, made.idle, made.available) == (0, 3, 6)
    made.share(made.find(keys[:1]))
    made.check([pages[:1]])
    made.release(pages[:1])
    made.check([])


def test_the_longest_unused_and_the_ends_of_texts_go_first():
    made = pool()
    old, new = keys_of(range(128)), keys_of(range(1, 129))
    for keys in (old, new):
        made.release(filled(made, keys))
    made.release(made.take(2))  # the two free ones
    assert made.find(old) + made.find(new) and made.idle == 4
    held = made.take(3)
    assert len(made.find(old)) == 1 and len(made.find(new)) == 2
    held += made.take(1)
    assert made.find(old) == [] and len(made.find(new)) == 2
    held += made.take(1)
    assert len(made.find(new)) == 1
    made.check([held])


def test_a_key_has_one_page_and_may_be_forgotten():
    made, keys = pool(), keys_of(range(128))
    first, second = filled(made, keys), filled(made, keys)
    assert made.find(keys) == first
    made.release(second)
    assert made.idle == 0 and made.find(keys) == first
    made.forget(first[1:])
    assert made.find(keys) == first[:1]
    made.release(first)
    assert (made.idle, made.available) == (1, 6)
    made.forget()
    assert made.find(keys) == [] and (made.idle, made.available) == (0, 6)
    made.check([])


def test_copies_have_all_layers():
    made = pool()
    made.pages.copy_(torch.randn(made.pages.shape))
    before = made.pages.clone()
    made.copy(2, 5)
    assert torch.equal(made.pages[:, 5], before[:, 2]) and torch.equal(made.pages[:, :5], before[:, :5])


@pytest.mark.parametrize(
    "fault",
    [
        lambda made, pages: made._free.append(pages[0]),
        lambda made, pages: made._free.pop(),
        lambda made, pages: made._references.__setitem__(pages[0], 2),
        lambda made, pages: made._idle.__setitem__(pages[0], None),
        lambda made, pages: made._key_of.clear(),
    ],
)
def test_check_finds_faults(fault):
    made = pool()
    pages = filled(made, keys_of(range(128)))
    made.check([pages])
    fault(made, pages)
    with pytest.raises(AssertionError):
        made.check([pages])
