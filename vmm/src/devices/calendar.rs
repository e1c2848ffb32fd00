//! The Gregorian calendar, as far as a clock chip needs it.

pub(super) const SECONDS_PER_DAY: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const DAYS_TO_EPOCH: i64 = 719_468;
const DAYS_PER_ERA: i64 = 146_097;

/// A moment in calendar terms, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

impl DateTime {
    /// From seconds since 1970. Years count from March internally, so that the leap day is
    /// the last of its year.
    pub(super) fn from_unix(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(SECONDS_PER_DAY), seconds.rem_euclid(86_400));
        let days = days + DAYS_TO_EPOCH;
        let (era, day_of_era) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (second / 3_600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }

    /// Seconds since 1970; fields beyond their range carry over.
    pub(super) fn to_unix(self) -> i64 {
        let month = i64::from(self.month);
        let year = self.year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * DAYS_PER_ERA + day_of_era - DAYS_TO_EPOCH;
        let minutes = i64::from(self.hour) * 60 + i64::from(self.minute);
        days * SECONDS_PER_DAY + minutes * 60 + i64::from(self.second)
    }

    /// 1 is Sunday.
    pub(super) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday, 5.
        ((self.to_unix().div_euclid(SECONDS_PER_DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates_convert_both_ways() {
        for (unix, fields, weekday) in [
            (0, (1970, 1, 1, 0, 0, 0), 5),
            (951_782_400, (2000, 2, 29, 0, 0, 0), 3),
            (1_700_000_000, (2023, 11, 14, 22, 13, 20), 3),
            (4_107_542_399, (2100, 2, 28, 23, 59, 59), 1),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0), 2),
            (-1, (1969, 12, 31, 23, 59, 59), 4),
        ] {
            let date = DateTime::from_unix(unix);
            let DateTime { year, month, day, hour, minute, second } = date;
            assert_eq!((year, month, day, hour, minute, second), fields);
            assert_eq!(date.to_unix(), unix);
            assert_eq!(date.weekday(), weekday);
        }
    }

    #[test]
    fn every_day_of_two_centuries_converts_both_ways() {
        for day in -25_000..50_000 {
            let unix = day * SECONDS_PER_DAY + 43_201;
            assert_eq!(DateTime::from_unix(unix).to_unix(), unix);
        }
    }
}
