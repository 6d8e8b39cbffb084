//! Which names stand nearest to one that nobody has: for messages that say what there is.

/// Characters of a name that are compared.
const COMPARED: usize = 64;

/// The names, nearest first, and at most so many of them. Upper and lower case are one, and a name that
/// has the wanted one in it, or is in it, is nearer than any other. Who calls bounds how many there are.
pub fn nearest<'n>(wanted: &str, names: impl IntoIterator<Item = &'n str>, most: usize) -> Vec<&'n str> {
    let wanted = compared(wanted);
    let mut ranked: Vec<(bool, usize, &str)> = names
        .into_iter()
        .map(|name| {
            let other = compared(name);
            let is_part = !wanted.is_empty() && (contains(&other, &wanted) || contains(&wanted, &other));
            (!is_part, distance(&wanted, &other), name)
        })
        .collect();
    ranked.sort_unstable();
    ranked.dedup();
    ranked.into_iter().take(most).map(|(_, _, name)| name).collect()
}

fn compared(name: &str) -> Vec<char> {
    name.chars().flat_map(char::to_lowercase).take(COMPARED).collect()
}

fn contains(whole: &[char], part: &[char]) -> bool {
    !part.is_empty() && whole.windows(part.len()).any(|window| window == part)
}

/// Characters that must be put in, taken out or changed to make one of the other.
pub fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut before = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = before + usize::from(x != y);
            before = row[j + 1];
            row[j + 1] = changed.min(before + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-3001
    #[test]
    fn names_come_nearest_first_and_no_more_than_are_wanted() {
        let names = ["mistral-7b", "qwen2.5-0.5b-instruct", "Qwen2.5-7B", "smollm2", "smollm2"];
        assert_eq!(nearest("qwen2.5-7b", names, 1), ["Qwen2.5-7B"], "case is nothing");
        assert_eq!(nearest("smolm2", names, 9)[0], "smollm2");
        assert_eq!(nearest("smolm2", names, 9).len(), 4, "each once");
        assert_eq!(nearest("qwen", names, 2), ["Qwen2.5-7B", "qwen2.5-0.5b-instruct"], "a part of it");
        assert_eq!(nearest("", names, 2).len(), 2);
        assert!(nearest("x", [], 2).is_empty());
    }

    // CLOUD-3001
    #[test]
    fn edits_are_counted() {
        for (a, b, edits) in [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)] {
            assert_eq!(distance(&compared(a), &compared(b)), edits, "{a} {b}");
        }
    }
}
