//! From send times and arrivals to losses and latencies. Pure: tested without a network.

use crate::outcome::{Direction, Spell};

/// One packet's arrival.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Its number.
    pub sequence: u32,
    /// When, ns on the monotonic clock.
    pub at: u64,
}

/// A delay worth telling when it was, ms: stock's quiet latency in this VM is below 10.
const SLOW_MS: f64 = 100.0;
/// Slow packets sent this close to each other are one spell, ms.
const SPELL_GAP_MS: f64 = 500.0;
/// Spells kept.
const SPELLS: usize = 20;

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// Judges one direction.
///
/// `sent_at[i]` is when request `i` was sent (ns); `set_out[i]` says whether packet `i` set out in this direction
/// (all of them for requests; those that B answered for replies). `arrivals` are in the order of arrival.
pub fn judge(sent_at: &[u64], set_out: &[bool], arrivals: &[Arrival], corrupted: u64, interval_ns: u64) -> Direction {
    let mut first = vec![None::<u64>; sent_at.len()];
    let mut result = Direction { corrupted, ..Direction::default() };
    let mut highest = None::<u32>;
    let mut last = None::<u64>;
    for arrival in arrivals {
        let Some(slot) = first.get_mut(arrival.sequence as usize) else {
            // A number that was never sent can only come from a damaged packet whose checksum fits by chance.
            result.corrupted += 1;
            continue;
        };
        if slot.is_some() {
            result.duplicated += 1;
            continue;
        }
        *slot = Some(arrival.at);
        if highest.is_some_and(|h| arrival.sequence < h) {
            result.reordered += 1;
        }
        highest = highest.max(Some(arrival.sequence));
        if let Some(last) = last {
            result.longest_gap_ms = result.longest_gap_ms.max(ms(arrival.at.saturating_sub(last)));
        }
        last = Some(arrival.at);
    }
    count_losses(&mut result, sent_at, set_out, &first, interval_ns);
    latencies(&mut result, sent_at, &first);
    result.slow = spells(sent_at, &first);
    result
}

fn spells(sent_at: &[u64], first: &[Option<u64>]) -> Vec<Spell> {
    let mut spells: Vec<Spell> = Vec::new();
    for (sent, arrived) in sent_at.iter().zip(first) {
        let Some(delay) = arrived.map(|at| ms(at.saturating_sub(*sent))) else { continue };
        if delay < SLOW_MS {
            continue;
        }
        let sent = ms(*sent);
        let full = spells.len() == SPELLS;
        match spells.last_mut() {
            Some(spell) if sent - spell.to_ms < SPELL_GAP_MS => {
                spell.to_ms = sent;
                spell.packets += 1;
                spell.worst_ms = spell.worst_ms.max(delay);
            }
            _ if full => break,
            _ => spells.push(Spell { from_ms: sent, to_ms: sent, packets: 1, worst_ms: delay }),
        }
    }
    spells
}

fn count_losses(result: &mut Direction, sent_at: &[u64], set_out: &[bool], first: &[Option<u64>], interval_ns: u64) {
    let begin = sent_at.first().copied().unwrap_or(0);
    let mut row = 0u64;
    for (i, arrived) in first.iter().enumerate() {
        if !set_out.get(i).copied().unwrap_or(false) {
            row = 0;
            continue;
        }
        result.sent += 1;
        if arrived.is_some() {
            result.received += 1;
            row = 0;
            continue;
        }
        result.lost += 1;
        row += 1;
        result.longest_lost_ms = result.longest_lost_ms.max(ms(row * interval_ns));
        let when = ms(sent_at.get(i).copied().unwrap_or(begin).saturating_sub(begin));
        result.first_lost_ms.get_or_insert(when);
        result.last_lost_ms = Some(when);
    }
}

fn latencies(result: &mut Direction, sent_at: &[u64], first: &[Option<u64>]) {
    let mut took: Vec<u64> =
        sent_at.iter().zip(first).filter_map(|(sent, at)| at.map(|at| at.saturating_sub(*sent))).collect();
    took.sort_unstable();
    let at = |share: f64| took.get(((took.len().saturating_sub(1)) as f64 * share) as usize).copied().unwrap_or(0);
    result.p50_ms = ms(at(0.5));
    result.p99_ms = ms(at(0.99));
    result.max_ms = ms(at(1.0));
    // Backwards, so that a lost packet knows the first arrival among those sent after it.
    let mut next = None::<u64>;
    for (sent, arrived) in sent_at.iter().zip(first).rev() {
        next = match (arrived, next) {
            (Some(at), Some(next)) => Some(next.min(*at)),
            (Some(at), None) => Some(*at),
            (None, next) => next,
        };
        let until = arrived.or(next);
        result.worst_ms = result.worst_ms.max(until.map_or(0.0, |u| ms(u.saturating_sub(*sent))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn arrivals(list: &[(u32, u64)]) -> Vec<Arrival> {
        list.iter().map(|&(sequence, at)| Arrival { sequence, at: at * MS }).collect()
    }

    #[test]
    fn slow_packets_are_told_by_spells() {
        let sent: Vec<u64> = [0, 10, 20, 30, 2000, 2010].map(|at| at * MS).to_vec();
        let got = arrivals(&[(0, 1), (1, 300), (2, 301), (3, 31), (4, 2200), (5, 2011)]);
        let d = judge(&sent, &[true; 6], &got, 0, 10 * MS);
        let spell = |from_ms, to_ms, packets, worst_ms| Spell { from_ms, to_ms, packets, worst_ms };
        assert_eq!(d.slow, [spell(10.0, 20.0, 2, 290.0), spell(2000.0, 2000.0, 1, 200.0)]);
    }

    #[test]
    fn nothing_lost() {
        let sent: Vec<u64> = (0..5).map(|i| i * 10 * MS).collect();
        let got = arrivals(&[(0, 1), (1, 11), (2, 21), (3, 31), (4, 43)]);
        let d = judge(&sent, &[true; 5], &got, 0, 10 * MS);
        assert_eq!((d.sent, d.received, d.lost, d.duplicated, d.reordered), (5, 5, 0, 0, 0));
        assert_eq!(d.max_ms, 3.0);
        assert_eq!(d.worst_ms, 3.0);
        assert_eq!(d.longest_gap_ms, 12.0);
        assert_eq!(d.first_lost_ms, None);
    }

    #[test]
    fn a_row_of_losses_counts_as_time_to_the_next_arrival() {
        let sent: Vec<u64> = (0..6).map(|i| i * 10 * MS).collect();
        let got = arrivals(&[(0, 1), (1, 11), (4, 41), (5, 51)]);
        let d = judge(&sent, &[true; 6], &got, 0, 10 * MS);
        assert_eq!(d.lost, 2);
        assert_eq!(d.longest_lost_ms, 20.0);
        assert_eq!(d.worst_ms, 21.0);
        assert_eq!((d.first_lost_ms, d.last_lost_ms), (Some(20.0), Some(30.0)));
    }

    #[test]
    fn duplicates_reordering_and_numbers_never_sent() {
        let sent: Vec<u64> = (0..3).map(|i| i * 10 * MS).collect();
        let got = arrivals(&[(1, 11), (0, 12), (0, 13), (2, 21), (9, 22)]);
        let d = judge(&sent, &[true; 3], &got, 1, 10 * MS);
        assert_eq!((d.lost, d.duplicated, d.reordered, d.corrupted), (0, 1, 1, 2));
    }

    #[test]
    fn a_reply_that_never_set_out_is_not_a_lost_reply() {
        let sent: Vec<u64> = (0..3).map(|i| i * 10 * MS).collect();
        let d = judge(&sent, &[true, false, true], &arrivals(&[(0, 1)]), 0, 10 * MS);
        assert_eq!((d.sent, d.received, d.lost), (2, 1, 1));
    }
}
