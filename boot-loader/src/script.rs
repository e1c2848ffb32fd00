//! The language of GRUB's configuration: words, blocks and conditions (GRUB manual, "Writing full
//! configuration files directly"). Loops and functions are read over: menus that tools write have
//! none that matter.

/// Deepest nesting of blocks.
const MAX_DEPTH: usize = 32;

/// A piece of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// As it is.
    Text(String),
    /// The value of a variable; outside of quotes it may be several words, or none.
    Variable { name: String, is_quoted: bool },
}

/// A word before its variables are put in.
pub(crate) type Word = Vec<Part>;

/// A statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Statement {
    /// A command, perhaps with a block of statements as its last argument.
    Command { words: Vec<Word>, block: Option<Vec<Statement>> },
    /// Conditions with what follows from each, and what follows if none holds.
    If { branches: Vec<(Vec<Statement>, Vec<Statement>)>, otherwise: Vec<Statement> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// The end of a line, or a semicolon.
    End,
    Open,
    Close,
}

/// Reads a script. What makes no sense is read over, as far as that can be done.
pub(crate) fn parse(text: &str) -> Vec<Statement> {
    let tokens = tokens(text);
    let mut parser = Parser { tokens: &tokens, at: 0 };
    let mut all = Vec::new();
    while parser.at < parser.tokens.len() {
        all.extend(parser.statements(&[], 0));
        // A word or brace that closes nothing.
        parser.at += 1;
    }
    all
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut word: Option<Word> = None;
    let mut at = 0;
    let put = |word: &mut Option<Word>, c: char| {
        let parts = word.get_or_insert_default();
        match parts.last_mut() {
            Some(Part::Text(text)) => text.push(c),
            _ => parts.push(Part::Text(c.to_string())),
        }
    };
    let finish = |word: &mut Option<Word>, tokens: &mut Vec<Token>| {
        tokens.extend(word.take().map(Token::Word));
    };
    let mut quote: Option<char> = None;
    while at < chars.len() {
        let c = chars[at];
        at += 1;
        match (quote, c) {
            (Some('\''), '\'') | (Some('"'), '"') => quote = None,
            (Some('\''), _) => put(&mut word, c),
            (_, '\\') => {
                let Some(next) = chars.get(at) else { continue };
                at += 1;
                let is_special = matches!(next, '$' | '"' | '\\' | '\n');
                if quote.is_some() && !is_special {
                    put(&mut word, '\\');
                }
                if *next != '\n' {
                    put(&mut word, *next);
                }
            }
            (_, '$') => {
                let braced = chars.get(at) == Some(&'{');
                let start = at + usize::from(braced);
                let len =
                    chars[start.min(chars.len())..].iter().take_while(|c| is_name(**c)).count();
                if len == 0 {
                    put(&mut word, '$');
                    continue;
                }
                let name: String = chars[start..start + len].iter().collect();
                let closed = braced && chars.get(start + len) == Some(&'}');
                at = start + len + usize::from(closed);
                let is_quoted = quote.is_some();
                word.get_or_insert_default().push(Part::Variable { name, is_quoted });
            }
            (Some(_), _) => put(&mut word, c),
            (None, '\'' | '"') => {
                quote = Some(c);
                // Also an empty one is a word.
                word.get_or_insert_default().push(Part::Text(String::new()));
            }
            (None, '#') if word.is_none() => {
                while chars.get(at).is_some_and(|c| *c != '\n') {
                    at += 1;
                }
            }
            (None, '\n' | ';') => {
                finish(&mut word, &mut tokens);
                tokens.push(Token::End);
            }
            (None, '{') if word.is_none() => tokens.push(Token::Open),
            (None, '}') if word.is_none() => tokens.push(Token::Close),
            (None, c) if c.is_whitespace() => finish(&mut word, &mut tokens),
            (None, c) => put(&mut word, c),
        }
    }
    finish(&mut word, &mut tokens);
    tokens
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a Token> {
        self.tokens.get(self.at)
    }

    /// The next token as a word of the language, such as `then`.
    fn keyword(&self) -> Option<&'a str> {
        match self.peek() {
            Some(Token::Word(parts)) => match &parts[..] {
                [Part::Text(text)] => Some(text),
                _ => None,
            },
            _ => None,
        }
    }

    fn skip_ends(&mut self) {
        while self.peek() == Some(&Token::End) {
            self.at += 1;
        }
    }

    /// Takes a word of the language, if it is next.
    fn take(&mut self, keyword: &str) -> bool {
        self.skip_ends();
        let is_next = self.keyword() == Some(keyword);
        self.at += usize::from(is_next);
        is_next
    }

    /// Statements up to one of the words in `until`, a closing brace, or the end; that is not taken.
    fn statements(&mut self, until: &[&str], depth: usize) -> Vec<Statement> {
        let mut all = Vec::new();
        loop {
            self.skip_ends();
            match self.peek() {
                None | Some(Token::Close) => return all,
                Some(Token::Open) => {
                    // A group by itself.
                    self.at += 1;
                    let inner = self.block(depth);
                    all.extend(inner);
                }
                Some(_) if self.keyword().is_some_and(|word| until.contains(&word)) => return all,
                Some(_) => all.extend(self.statement(depth)),
            }
        }
    }

    /// The rest of a block whose brace is open.
    fn block(&mut self, depth: usize) -> Vec<Statement> {
        if depth >= MAX_DEPTH {
            self.at = self.tokens.len();
            return Vec::new();
        }
        let inner = self.statements(&[], depth + 1);
        if self.peek() == Some(&Token::Close) {
            self.at += 1;
        }
        inner
    }

    fn statement(&mut self, depth: usize) -> Option<Statement> {
        if depth >= MAX_DEPTH {
            self.at = self.tokens.len();
            return None;
        }
        match self.keyword() {
            Some("if") => {
                self.at += 1;
                return Some(self.condition(depth + 1));
            }
            Some("while" | "until" | "for") => {
                self.at += 1;
                self.statements(&["done"], depth + 1);
                self.take("done");
                return None;
            }
            Some("function") => {
                self.at += 1;
                self.command(depth);
                return None;
            }
            _ => {}
        }
        Some(self.command(depth))
    }

    fn command(&mut self, depth: usize) -> Statement {
        let mut words = Vec::new();
        loop {
            match self.peek() {
                Some(Token::Word(word)) => {
                    words.push(word.clone());
                    self.at += 1;
                }
                Some(Token::Open) => {
                    self.at += 1;
                    let block = Some(self.block(depth));
                    return Statement::Command { words, block };
                }
                Some(Token::End | Token::Close) | None => {
                    return Statement::Command { words, block: None };
                }
            }
        }
    }

    fn condition(&mut self, depth: usize) -> Statement {
        let mut branches = Vec::new();
        let mut otherwise = Vec::new();
        loop {
            let condition = self.statements(&["then", "fi"], depth);
            self.take("then");
            let body = self.statements(&["elif", "else", "fi"], depth);
            branches.push((condition, body));
            if self.take("elif") {
                continue;
            }
            if self.take("else") {
                otherwise = self.statements(&["fi"], depth);
            }
            self.take("fi");
            return Statement::If { branches, otherwise };
        }
    }
}
