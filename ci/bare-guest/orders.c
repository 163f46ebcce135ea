// SPDX-License-Identifier: Apache-2.0 OR MIT

// The orders that the guest takes, one a line. README.md lists them.

#include "guest.h"

static char line[256];
// The part of the line that is not yet read.
static char *rest;

static int word(const char *name)
{
    char *at = rest;
    while (*name && *at == *name)
        at++, name++;
    if (*name || (*at && *at != ' '))
        return 0;
    rest = at;
    return 1;
}

static uint64_t number(void)
{
    uint64_t value = 0, base = 10;
    while (*rest == ' ')
        rest++;
    if (rest[0] == '0' && rest[1] == 'x')
        base = 16, rest += 2;
    for (; *rest && *rest != ' '; rest++) {
        uint64_t digit = *rest <= '9' ? *rest - '0' : (*rest | 32) - 'a' + 10;
        value = value * base + digit;
    }
    return value;
}

static void answer(uint64_t value)
{
    say("OK");
    say_number(value);
    say("\n");
}

static void fill(uint64_t address, uint64_t size, uint8_t byte)
{
    uint64_t words = size / 8, last = address + size;
    // By words, because a KVM that interprets the guest counts the steps of a repetition.
    asm volatile("rep stosq"
                 : "+D"(address), "+c"(words)
                 : "a"(byte * 0x0101010101010101ul)
                 : "memory");
    while (address < last)
        store8(address++, byte);
}

static void set_vectors(uint64_t table, uint64_t count, uint64_t first, uint64_t span)
{
    for (uint64_t i = 0; i < count; i++, table += 16) {
        store32(table, APIC);
        store32(table + 4, 0);
        store32(table + 8, first + i % span);
        store32(table + 12, 0);
    }
}

static int handle(void)
{
    // The operands of an order, in its sequence.
    uint64_t a, b, c;
    if (word("readb")) {
        answer(load8(number()));
    } else if (word("readw")) {
        answer(load16(number()));
    } else if (word("readl")) {
        answer(load32(number()));
    } else if (word("readq")) {
        answer(load64(number()));
    } else if (word("writeb")) {
        a = number();
        store8(a, number());
        answer(0);
    } else if (word("writew")) {
        a = number();
        store16(a, number());
        answer(0);
    } else if (word("writel")) {
        a = number();
        store32(a, number());
        answer(0);
    } else if (word("writeq")) {
        a = number();
        store64(a, number());
        answer(0);
    } else if (word("inb")) {
        answer(in8(number()));
    } else if (word("outb")) {
        a = number();
        out8(a, number());
        answer(0);
    } else if (word("inl")) {
        answer(in32(number()));
    } else if (word("outl")) {
        a = number();
        out32(a, number());
        answer(0);
    } else if (word("memset")) {
        a = number(), b = number();
        fill(a, b, number());
        answer(0);
    } else if (word("repeat")) {
        a = number(), b = number();
        for (c = number(); c; c--)
            store32(a, b);
        answer(0);
    } else if (word("toggle")) {
        a = number();
        for (b = number(); b; b--) {
            store32(a, 1);
            store32(a, 0);
        }
        answer(0);
    } else if (word("vectors")) {
        a = number(), b = number(), c = number();
        set_vectors(a, b, c, number());
        answer(0);
    } else if (word("taken")) {
        a = number() & 255, c = 0;
        for (b = number(); b && a < 256; b--)
            c += taken[a++];
        answer(c);
    } else if (word("await")) {
        a = number() & 255, b = number();
        sleep_until(a, b, number());
        answer(taken[a]);
    } else if (word("echo")) {
        a = number(), b = number();
        set_echo(a, b, number());
        answer(0);
    } else {
        return 0;
    }
    return 1;
}

// Called by start.S.
void run(void)
{
    start_serial();
    say("BEGIN\n");
    start_interrupts();
    start_pci();
    say("READY\n");
    for (;;) {
        hear(line, sizeof line);
        rest = line;
        // The tag.
        while (*rest && *rest != ' ') {
            char c[2] = { *rest++, 0 };
            say(c);
        }
        say(" ");
        while (*rest == ' ')
            rest++;
        if (!handle())
            say("FAIL unknown order\n");
    }
}
