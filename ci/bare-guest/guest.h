// SPDX-License-Identifier: Apache-2.0 OR MIT

// Declarations that the parts of the bare guest share: access to memory and ports, and the
// functions of each part.

#pragma once

#include <stdint.h>

// Defines a load and a store of one width. Each is one instruction, as a driver's would be.
#define ACCESS(width, type)                                                                        \
    static inline type load##width(uint64_t address)                                               \
    {                                                                                              \
        type value;                                                                                \
        asm volatile("mov %1, %0" : "=r"(value) : "m"(*(volatile type *)address) : "memory");      \
        return value;                                                                              \
    }                                                                                              \
    static inline void store##width(uint64_t address, type value)                                  \
    {                                                                                              \
        asm volatile("mov %1, %0" : "=m"(*(volatile type *)address) : "r"(value) : "memory");      \
    }
ACCESS(8, uint8_t)
ACCESS(16, uint16_t)
ACCESS(32, uint32_t)
ACCESS(64, uint64_t)

static inline uint8_t in8(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint32_t in32(uint16_t port)
{
    uint32_t value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void out32(uint16_t port, uint32_t value)
{
    asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

// serial.c

void start_serial(void);
void say(const char *text);
void say_number(uint64_t number);
// Reads a line that is not empty. Characters that do not fit are left out.
void hear(char *line, uint32_t size);

// interrupts.c

// Address of the local APIC, to which MSI messages go.
#define APIC 0xfee00000ul

// Number of interrupts so far, by vector.
extern volatile uint64_t taken[256];

void start_interrupts(void);
// Sleeps until `times` interrupts have come by a vector, or for so many ticks of 10 ms.
void sleep_until(uint8_t vector, uint64_t times, uint64_t ticks);
// Stores `value` at `address` at each interrupt by a vector. 0 is no vector.
void set_echo(uint8_t vector, uint64_t address, uint32_t value);

// pci.c

// Opens the machine's memory below 1 MiB, and gives each PCI device its addresses.
void start_pci(void);
