"""The embedded data is read whole and as it is."""

from spectune.bases import sources


def test_questions_have_labels_of_a_kind_and_a_detail():
    found = sources.questions()
    assert len(found) > 5000
    assert all(label.count(":") == 1 and question for label, question in found)
    assert ("DESC:manner", "How did serfdom develop in and then leave Russia ?") in found


def test_reviews_have_ratings():
    for source in ("movieReviewSnippets", "amazonReviewSnippets"):
        found = sources.reviews(source)
        assert len(found) > 3000
        assert all(text == text.strip() and -4 <= rating <= 4 for text, rating in found.items())


def test_dialogue_and_messages_are_pairs():
    assert len(sources.dialogue()) > 10_000
    spam = [text for text, is_spam in sources.messages() if is_spam]
    assert 0.1 < len(spam) / len(sources.messages()) < 0.2
